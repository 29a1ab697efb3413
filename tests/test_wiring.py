"""What putting the layers together does beside that."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_mcp.config import Config
from mlx_mcp.core.memory import DeviceMemory, MemorySettings, budget_for
from mlx_mcp.service.models import Fits, fits
from mlx_mcp.wiring import wire

PROGRAM = """
import gc
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.wiring import LateLoader
LateLoader(Config()).prepare(Registry(None).resolve(None), lambda line: None)
frozen = gc.get_freeze_count()
LateLoader(Config()).prepare(Registry(None).resolve(None), lambda line: None)
print(frozen, len(gc.get_objects()), gc.get_freeze_count() - frozen)
"""


def test_what_is_imported_for_models_is_never_looked_through_for_garbage_again():
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    frozen, others, later = map(int, subprocess.run([sys.executable, "-c", PROGRAM], **options).stdout.split())
    assert frozen > 10 * others
    assert later <= 0  # no model is ever frozen: it may go again


@pytest.mark.parametrize(("backend", "size", "larger"), [("cuda", 24, 70), ("metal", 48, 70), ("cpu", 64, 41)])
def test_what_fits_is_known_by_the_device_before_any_model_is_loaded(monkeypatch, backend, size, larger):
    device = DeviceMemory(backend, size * 10**9)
    monkeypatch.setattr("mlx_mcp.mlx_backend.device_memory.device_memory", lambda: device)
    client, _ = wire(Config.load(openblas=False))
    budget = budget_for(MemorySettings(), device)
    assert client.stats.max_weights_bytes == budget.max_weights_bytes
    assert fits(budget.max_weights_bytes, client.stats) is Fits.YES
    assert fits(larger * 10**9, client.stats) is Fits.NO


def test_what_is_free_of_a_gpu_is_asked_before_a_model_takes_of_it(monkeypatch):
    found = [DeviceMemory("cuda", 24 * 10**9), DeviceMemory("cuda", 10**9)]
    monkeypatch.setattr("mlx_mcp.mlx_backend.device_memory.device_memory", lambda: found.pop(0))
    client, registry = wire(Config.load(openblas=False))
    with ThreadPoolExecutor() as pool:  # the thread that prepares a model leaves no streams behind
        prepared = pool.submit(client.loader.prepare, registry.resolve(None), lambda progress: None).result()
    assert prepared.budget == budget_for(MemorySettings(), DeviceMemory("cuda", 24 * 10**9))
    assert len(found) == 1
