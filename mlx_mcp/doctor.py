"""What `mlx-mcp doctor` looks at. Each finding says what to do, where there is something to do."""

from __future__ import annotations

import asyncio
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Literal

from mlx_mcp import __version__
from mlx_mcp.chat.message import Message
from mlx_mcp.config import Config, available_memory_bytes, config_path
from mlx_mcp.core.memory import budget_for
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.requests import GenerateRequest, Result
from mlx_mcp.errors import MlxMcpError, SandboxFailed
from mlx_mcp.mlx_backend.cpu.openblas import HINT, find_openblas, prefer_openblas
from mlx_mcp.models.registry import EMBEDDED
from mlx_mcp.process import endings
from mlx_mcp.process.place import trials_file, user_place
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.count import count_tokens
from mlx_mcp.service.generate import Options
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import memory_settings, wire
from mlx_mcp.workflows.asking import unheard
from mlx_mcp.workflows.reason_over.question import Purse
from mlx_mcp.workflows.reason_over.trial import PROBE, key_of, writes_programs
from mlx_mcp.workflows.sandbox.isolation import advice
from mlx_mcp.workflows.sandbox.opening import Python, open_runtime
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing
from mlx_mcp.workflows.sandbox.trials import Trials

TESTED = {"mcp": "2.3", "mlx": "0.32", "mlx-lm": "0.32"}
QUESTION = "Dana's badge is 482. The launch code is 9053. Rex has the color green. What is the launch code?"
ANSWER = "9053"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    kind: Literal["ok", "hint", "fault"]
    text: str


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything, the quick things first."""
    yield Finding("ok", f"mlx-mcp {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package, tested in TESTED.items():
        yield package_finding(package, tested)
    where = "found" if config_path().is_file() else "none, defaults in force"
    yield Finding("ok", f"settings file {config_path()}: {where}")
    if config.openblas:
        prefer_openblas()  # as the server does, before mlx is imported
    try:
        yield from device_findings(config)
    except ImportError as error:
        yield Finding("fault", f"mlx does not import: {error}. On Linux install `mlx[cpu]` or `mlx[cuda13]`.")
        return
    if less := endings.told(user_place()):
        yield Finding("hint", f"{less}.")
    client, registry = wire(config)
    for entry in registry.entries():
        size = "not downloaded yet" if entry.weights_bytes is None else f"{entry.weights_bytes / 1e6:,.1f} MB"
        yield Finding("ok", f"model {entry.spec.name}{' (default)' if entry.default else ''}: {size}")
    found = sandbox_finding(config.sandbox_python)
    sandboxes_work = found.kind != "fault"
    yield found
    if registry.nothing_configured:
        yield Finding("hint", "no model is configured: the small embedded one serves. Choose one with --model.")
    try:
        yield asyncio.run(embedded_finding(client))
        if sandboxes_work:
            yield asyncio.run(programs_finding(Service(client, registry), Trials(trials_file()), config.sandbox_python))
    finally:
        client.close()


def report(config: Config, findings: list[Finding]) -> dict[str, Any]:
    """The findings for an issue: no setting's value, no prompt, and no name of the user's folder."""
    home = str(Path.home())
    return {
        "version": __version__,
        "sound": all(finding.kind != "fault" for finding in findings),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "settings": sorted(config.model_fields_set),
        "findings": [{"kind": finding.kind, "text": finding.text.replace(home, "~")} for finding in findings],
    }


def package_finding(package: str, tested: str) -> Finding:
    """Whether a package is there, in a version that was tested."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding("fault", f"{package} is not installed: install mlx-mcp again.")
    if not found.startswith(tested + "."):
        return Finding("hint", f"{package} {found}: tested with {tested}")
    return Finding("ok", f"{package} {found}")


def device_findings(config: Config) -> Iterator[Finding]:
    """Which device computes, and on Linux CPUs with which BLAS."""
    import mlx.core as mx

    from mlx_mcp.mlx_backend.device_memory import device_memory  # which imports mlx

    device = mx.default_device()
    found = device_memory()
    yield Finding("ok", f"backend {found.backend}, device {device}, {available_memory_bytes() / 1e9:.0f} GB of memory")
    settings = memory_settings(config, endings.share_of(endings.read(endings.running(user_place()))))
    yield Finding("ok", budget_for(settings, found).words)
    yield from backend_findings(found.backend)
    if sys.platform.startswith("linux") and device == mx.cpu:
        path = find_openblas()
        if path is None:
            yield Finding("hint", f"slow reference BLAS: installing OpenBLAS makes prompts many times faster ({HINT}).")
        elif not config.openblas:
            yield Finding("hint", f"OpenBLAS is installed ({path}) but switched off: --openblas is many times faster.")
        else:
            yield Finding("ok", f"OpenBLAS in front: {path}")


def backend_findings(backend: str) -> Iterator[Finding]:
    """Whether the backend in force is the one that this machine and what is installed let expect."""
    wheels = sorted({d.name for d in distributions() if d.name and d.name.startswith(("mlx-cpu", "mlx-cuda"))})
    cuda = next((name for name in wheels if "cuda" in name), None)
    if cuda is not None and len(wheels) > 1:
        # Both wheels write mlx/lib/libmlx.so: whichever was installed last is in force.
        yield Finding(
            "hint",
            f"{' and '.join(wheels)} overwrite each other. For the GPU: pip uninstall -y mlx-cpu && "
            f"pip install --force-reinstall --no-deps {cuda}=={version(cuda)}.",
        )
    if cuda is not None and backend != "cuda":
        yield Finding("hint", f"{cuda} is installed and does not compute: look whether nvidia-smi shows a GPU.")
    if backend == "cpu" and sys.platform == "darwin":
        yield Finding(
            "hint", "Metal is not in force: this needs an Apple chip, and a Python for arm64, not for x86_64."
        )


def sandbox_finding(python: Python = "monty") -> Finding:
    """What programs of `sandbox_run` run in, which is tried out."""
    try:
        with tempfile.TemporaryDirectory(prefix="mlx-mcp-doctor-") as folder:
            runtime = asyncio.run(open_runtime(Path(folder), python))
    except SandboxFailed as error:
        return Finding("fault", str(error))
    interpreter = runtime.version if python == "cpython" else f"pydantic-monty {version('pydantic-monty')}"
    found = f"sandbox: {interpreter}, isolation: {runtime.isolation}"
    hint = advice(runtime.isolation)
    return Finding("hint", f"{found}; {hint}.") if hint else Finding("ok", found)


async def embedded_finding(client: EngineClient) -> Finding:
    """Whether the embedded model recalls a fact, through the whole engine."""
    began, text = time.monotonic(), ""
    try:
        async for update in client.generate(GenerateRequest((Message("user", QUESTION),), EMBEDDED, Sampling(32))):
            if isinstance(update, Result):
                text = update.text
    except MlxMcpError as error:
        return Finding("fault", f"the embedded model does not answer: {error}")
    if text.strip() != ANSWER:
        return Finding(
            "fault", f"the embedded model answers {text!r} instead of {ANSWER!r}: the installation is damaged."
        )
    return Finding("ok", f"the embedded model answers right, {time.monotonic() - began:.1f} s with loading")


async def programs_finding(service: Service, trials: Trials, python: Python = "monty") -> Finding:
    """Whether the default model can write programs for `reason_over`, which is tried where it is not known."""
    entry = next(entry for entry in service.registry.entries() if entry.default)
    name, known = entry.spec.name, trials.known(key_of(service, ""))
    if known is None:
        if entry.weights_bytes is None:
            return Finding("ok", f"whether {name} can write programs is tried once it is downloaded")
        if user_place().listener_pid() is not None:  # it may have the model in memory, which has room for one
            return Finding(
                "hint",
                f"whether {name} can write programs is not known: reason_over tries it at its first use, or "
                "`mlx-mcp engine stop` and then `mlx-mcp doctor`.",
            )
        try:
            known = await tried(service, trials, python)
        except MlxMcpError as error:
            return Finding("hint", f"whether {name} can write programs could not be tried: {error}")
    does = "writes its own programs" if known else "cannot write programs: ours read the input for it, part by part"
    return Finding("ok", f"reason_over: {name} {does}")


async def tried(service: Service, trials: Trials, python: Python) -> bool:
    """Load the default model, and try whether it can write programs."""
    with tempfile.TemporaryDirectory(prefix="mlx-mcp-doctor-") as folder:
        sandboxes = Sandboxes(partial(open_runtime, Path(folder), python), trials=trials)
        async with closing(sandboxes):
            counted = await count_tokens(
                service, Caller(), Context(messages=(Message("user", QUESTION),)), Options(), unheard
            )
            return await writes_programs(service, Caller(), sandboxes, "", counted.context_tokens, Purse(PROBE.budget))
