"""What devices say of their memory, and what a model comes with where that is limited."""

import os

import mlx.core as mx
import pytest

from mlx_mcp.core.memory import Budget, DeviceMemory, MemorySettings, budget_for
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.errors import ConfigError
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.device_memory import described, device_memory, limit_mlx
from mlx_mcp.mlx_backend.loader import MlxLoader
from mlx_mcp.mlx_backend.pass_memory import pass_bytes
from tests.models_made import make_model

GB = 10**9
M4_MAX = {
    "architecture": "applegpu_g16s",
    "max_recommended_working_set_size": 115_448_725_504,
    "memory_size": 137_438_953_472,
    "resource_limit": 499_000,
    "max_buffer_length": 86_586_540_032,
}


def test_metal_says_what_it_recommends_and_how_many_buffers_there_may_be():
    found = described(M4_MAX, 0, metal=True)
    assert (found.backend, found.usable_bytes, found.max_buffers) == ("metal", 115_448_725_504, 499_000)
    assert described({}, 9 * GB, metal=True).usable_bytes == 6 * GB


def test_on_cuda_what_other_processes_hold_is_not_counted_on():
    assert described({"total_memory": 80 * GB, "free_memory": 79 * GB}, 0, metal=False).usable_bytes == 70 * GB
    assert described({"total_memory": 80 * GB, "free_memory": 20 * GB}, 0, metal=False).usable_bytes == 20 * GB


def test_mlx_is_given_the_ceiling_and_its_cache_and_nothing_is_wired(monkeypatch):
    told = {}
    for name in ("set_memory_limit", "set_cache_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, lambda limit, name=name: told.update({name: limit}))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    limit_mlx(Budget(5, None), 0)
    assert told == {}
    limit_mlx(Budget(5, None, 9, 2), 0)
    assert told == {"set_memory_limit": 9, "set_cache_limit": 2}
    limit_mlx(Budget(5, None, 9, 2), 7)
    assert told["set_wired_limit"] == 7


def test_more_than_can_be_wired_is_refused_with_the_systems_own_limit(monkeypatch):
    def refuse(limit):
        raise ValueError("larger than the system's")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit: 0)
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with pytest.raises(ConfigError, match=r"cannot be wired.*iogpu\.wired_limit_mb"):
        limit_mlx(Budget(5, None, 9, 2), 7)


def test_the_device_in_force_is_asked():
    found, physical = device_memory(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.is_gpu is not device.on_cpu()
    if device.on_cpu():
        assert found == DeviceMemory("cpu", physical)
    else:
        assert found == described(mx.device_info(), physical, mx.metal.is_available())


@pytest.mark.parametrize("way", ["CPU", "GPU"])
def test_a_model_comes_with_the_ceiling_and_a_pass_where_the_device_has_one_memory_for_all(tmp_path, monkeypatch, way):
    monkeypatch.setattr(device, "on_cpu", lambda: way == "CPU")
    folder, budget, limits = make_model(tmp_path, head_dim=32), budget_for(MemorySettings(), device_memory()), {}
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit, name=name: limits.update({name: limit}))

    def prepare(kv_bits=None):
        loader = MlxLoader(kv_bits, budget=budget)
        prepared = loader.prepare(ModelSpec("m", "folder", str(folder)), lambda progress: None)
        for _ in loader.materialise(prepared):
            pass
        return prepared

    found = prepare()
    if way == "CPU":
        assert (found.budget, found.pass_bytes) == (None, 0)
        assert limits == {"set_cache_limit": device.SPARE_BYTES}
    else:
        assert found.budget == budget
        assert found.pass_bytes == pass_bytes(found.config, 2048)
        assert limits == {"set_memory_limit": budget.ceiling_bytes, "set_cache_limit": budget.cache_bytes}
        assert prepare(8).pass_bytes == pass_bytes(found.config, 2048, 8)
