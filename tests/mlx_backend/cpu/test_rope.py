"""Positions whose angles all layers share are bit by bit those that each layer computes for itself."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.cpu.rope import share_angles
from tests.mlx_backend.operations import of_graph
from tests.mlx_backend.test_runner import Machine, sequence
from tests.models_made import make_model

ROPES = {
    "whole": {},
    "base and scale": {"base": 1e6, "scale": 0.25},
    "a part of the width": {"dims": 32},
    "neighbours": {"traditional": True},
}


class Layers(nn.Module):
    """Three layers with positions, of which the second has others."""

    def __init__(self, dims=64, **options):
        super().__init__()
        self.ropes = [nn.RoPE(dims, **options), nn.RoPE(dims, base=500.0), nn.RoPE(dims, **options)]


def same(one, other):
    return (np.array(one.view(mx.uint8)) == np.array(other.view(mx.uint8))).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("offset", [0, 7, "rows"])
def test_what_is_turned_by_shared_angles_is_the_same_bit_by_bit(name, dtype, offset):
    rows, tokens = (3, 1) if offset == "rows" else (1, 9)
    at = mx.array([5, 0, 1000]) if offset == "rows" else offset
    xs = [mx.random.normal((rows, heads, tokens, 64)).astype(dtype) for heads in (4, 2)]
    model = Layers(**ROPES[name])
    expected = [rope(x, at) for rope in model.ropes for x in xs]
    angles = share_angles(model)
    if offset == "rows":
        angles.begin(at)
    found = [rope(x, at) for rope in model.ropes for x in xs]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_each_pass_has_angles_of_its_own():
    model, plain, x = Layers(), nn.RoPE(64), mx.random.normal((2, 4, 1, 64))
    rope, angles = model.ropes[0], share_angles(model)
    for offsets in ([3, 4], [4, 5], [9, 1]):
        at = mx.array(offsets)
        angles.begin(at)
        assert same(rope(x, at), plain(x, at))
        assert same(rope(x, mx.array([7, 7])), plain(x, mx.array([7, 7])))  # which nobody has named
    for at in (0, 5, 0):
        for chunk in (x, mx.random.normal((1, 4, 6, 64))):
            assert same(rope(chunk, at), plain(chunk, at))
    flat = mx.random.normal((2, 6, 64))
    assert same(rope(flat, 5), plain(flat, 5))


def test_angles_are_computed_once_for_all_layers(tmp_path):
    def operations(model):
        at, x = mx.array([5, 6]), mx.random.normal((2, 4, 1, 64))
        mx.eval(at, x)
        if model is sharing:
            angles.begin(at)
        for rope in model.ropes:
            x = rope(x, at)
        return of_graph([x], tmp_path / "graph")

    plain, sharing = (Layers() for _ in range(2))
    angles = share_angles(sharing)
    assert operations(plain)["Cos"] == 3
    assert operations(sharing)["Cos"] == 2  # the third has those of the first, by base


def test_a_second_runner_of_a_model_has_the_say():
    model, plain, x = Layers(), nn.RoPE(64), mx.random.normal((1, 4, 1, 64))
    first, second = share_angles(model), share_angles(model)
    assert model.ropes[0].angles is second is not first
    assert same(model.ropes[0](x, 3), plain(x, 3))


@pytest.mark.parametrize(("way", "expected"), [("CPU", 1), ("GPU", 4)])
def test_a_step_of_a_model_on_a_cpu_computes_angles_once(tmp_path, monkeypatch, way, expected):
    monkeypatch.setattr(device, "on_cpu", lambda: way == "CPU")
    model, _ = load_model(make_model(tmp_path))  # two layers, each with queries and keys
    machine = Machine(model)
    for index in range(3):
        machine.scheduler.add(sequence(index, 5 + index))
    while not all(s.decoding for s in machine.scheduler.running) or machine.scheduler.waiting:
        machine.advance(ahead=False)
    calls, rope = [], mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda x, *rest, **more: calls.append(x.shape) or rope(x, *rest, **more))
    for _ in range(3):
        calls.clear()
        machine.advance(ahead=False)
        assert len(calls) == expected
