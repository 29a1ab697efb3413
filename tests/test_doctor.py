"""The backend in force, as doctor names it: metal, cuda, cpu, and none."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_mcp import doctor
from mlx_mcp.config import Config
from mlx_mcp.core.memory import DeviceMemory
from mlx_mcp.errors import SandboxFailed
from mlx_mcp.mlx_backend import device_memory
from mlx_mcp.process import endings
from mlx_mcp.process.place import user_place
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from mlx_mcp.workflows.reason_over.trial import key_of
from mlx_mcp.workflows.sandbox.trials import Trials


def wheels(monkeypatch, *names):
    monkeypatch.setattr(doctor, "distributions", lambda: [SimpleNamespace(name=name) for name in names])
    monkeypatch.setattr(doctor, "version", lambda name: "0.32.4")


def told(findings):
    return "\n".join(f"{finding.kind}: {finding.text}" for finding in findings)


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_names_the_backend_in_force_and_what_was_set(monkeypatch, backend):
    wheels(monkeypatch, *(["mlx-cuda-13"] if backend == "cuda" else []))
    monkeypatch.setattr(device_memory, "device_memory", lambda: DeviceMemory(backend, 48 * 10**9))
    said = told(doctor.device_findings(Config.load()))
    assert f"ok: backend {backend}, " in said
    assert "ok: memory: 45.0 GB in all" in said


def test_after_a_death_doctor_says_how_much_is_taken(monkeypatch):
    wheels(monkeypatch)
    monkeypatch.setattr(device_memory, "device_memory", lambda: DeviceMemory("metal", 48 * 10**9))
    place = user_place()
    place.prepare()
    before = endings.read(endings.running(place))
    try:
        endings.write(endings.running(place), {"pid": 1, "share": 0.875})
        assert "memory: 39.4 GB in all" in told(doctor.device_findings(Config.load()))
    finally:
        endings.write(endings.running(place), before)


@pytest.mark.parametrize(
    ("names", "backend", "platform", "expected"),
    [
        (["mlx-cpu"], "cpu", "linux", ""),
        (["mlx-cuda-13"], "cuda", "linux", ""),
        (["mlx-cpu", "mlx-cuda-13"], "cuda", "linux", "overwrite each other"),
        (["mlx-cuda-13"], "cpu", "linux", "look whether nvidia-smi shows a GPU"),
        ([], "cpu", "darwin", "Metal is not in force"),
        ([], "metal", "darwin", ""),
    ],
)
def test_says_what_to_do_where_another_backend_is_to_be_expected(monkeypatch, names, backend, platform, expected):
    wheels(monkeypatch, *names)
    monkeypatch.setattr(sys, "platform", platform)
    said = told(doctor.backend_findings(backend))
    assert expected in said
    assert bool(said) == bool(expected)


def test_without_any_backend_it_says_what_to_install(monkeypatch):
    def missing(config):
        raise ImportError("libmlx.so: cannot open shared object file")
        yield

    monkeypatch.setattr(doctor, "device_findings", missing)
    said = told(doctor.examine(Config.load()))
    assert "fault: mlx does not import: libmlx.so" in said
    assert "mlx[cuda13]" in said


@pytest.mark.parametrize(
    ("isolation", "kind", "advised"),
    [("bubblewrap", "ok", ""), ("seatbelt", "ok", ""), ("interpreter only", "hint", "install bubblewrap")],
)
def test_says_what_is_around_programs_of_a_sandbox(monkeypatch, isolation, kind, advised):
    async def found(folder, python):
        return SimpleNamespace(isolation=isolation, version="cpython 3.11.7")

    monkeypatch.setattr(doctor, "open_runtime", found)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = doctor.sandbox_finding()
    assert finding.kind == kind
    assert f"isolation: {isolation}" in finding.text
    assert advised in finding.text
    assert "pydantic-monty" in finding.text
    assert "sandbox: cpython 3.11.7, isolation" in doctor.sandbox_finding("cpython").text


def test_a_sandbox_that_cannot_start_is_a_fault(monkeypatch):
    async def broken(folder, python):
        raise SandboxFailed("Sandboxes need the package pydantic-monty. Run: pip install it.")

    monkeypatch.setattr(doctor, "open_runtime", broken)
    assert doctor.sandbox_finding() == doctor.Finding(
        "fault", "Sandboxes need the package pydantic-monty. Run: pip install it."
    )


@pytest.fixture
def service():
    client, registry = wire(Config.load(max_ssd_bytes=0))
    yield Service(client, registry)
    client.close()


CANNOT = "ok: reason_over: embedded cannot write programs: ours read the input for it, part by part"


@pytest.mark.long
async def test_tries_once_whether_the_default_model_writes_programs(service, tmp_path, monkeypatch):
    trials = Trials(str(tmp_path / "writes-programs.json"))
    assert told([await doctor.programs_finding(service, trials)]) == CANNOT
    assert trials.known(key_of(service, "")) is False
    monkeypatch.setattr(doctor, "tried", None)  # which would fail
    assert told([await doctor.programs_finding(service, trials)]) == CANNOT


async def test_what_is_known_of_the_default_model_is_said_without_a_trial(service, monkeypatch):
    monkeypatch.setattr(doctor, "tried", None)  # which would fail
    trials = Trials()
    for can, said in ((False, CANNOT), (True, "ok: reason_over: embedded writes its own programs")):
        trials.note(key_of(service, ""), can)
        assert told([await doctor.programs_finding(service, trials)]) == said


async def test_does_not_load_a_model_beside_a_running_engine_or_one_that_is_not_there(service, monkeypatch):
    monkeypatch.setattr(doctor, "tried", None)
    monkeypatch.setattr(doctor, "user_place", lambda: SimpleNamespace(listener_pid=lambda: 17))
    assert "reason_over tries it at its first use, or `mlx-mcp engine stop`" in told(
        [await doctor.programs_finding(service, Trials())]
    )
    entry = replace(service.registry.entries()[0], weights_bytes=None)
    monkeypatch.setattr(service.registry, "entries", lambda: [entry])
    assert "is tried once it is downloaded" in told([await doctor.programs_finding(service, Trials())])


async def test_a_trial_that_could_not_be_made_is_said_with_its_reason(service, monkeypatch):
    async def fails(*given):
        raise SandboxFailed("The sandbox's interpreter does not start. Try again.")

    monkeypatch.setattr(doctor, "tried", fails)
    said = told([await doctor.programs_finding(service, Trials())])
    assert said.startswith(
        "hint: whether embedded can write programs could not be tried: The sandbox's interpreter does"
    )
