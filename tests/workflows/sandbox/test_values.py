"""What may leave a sandbox."""

import json
from collections import namedtuple
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import PurePosixPath

import pytest

from mlx_mcp.workflows.sandbox import values
from mlx_mcp.workflows.sandbox.values import MAX_DEPTH, TooLarge, plain, sendable


def test_plain_values_stay_and_others_become_what_json_has():
    point = namedtuple("point", "x y")
    given = {
        "a": [1, 2.5, None, True, "x", (1, "y")],
        "set": {3},
        "when": [date(2026, 1, 2), datetime(2026, 1, 2, 3), timedelta(1)],
        "other": [Decimal("1.5"), PurePosixPath("a/b"), b"ab", b"\xff", ValueError("v"), point(1, 2)],
        (1, 2): "tuple",
        10**6000: 10**6000,
    }
    assert plain(given) == {
        "a": [1, 2.5, None, True, "x", (1, "y")],
        "set": [3],
        "when": ["2026-01-02", "2026-01-02T03:00:00", "1 day, 0:00:00"],
        "other": ["1.5", "a/b", "ab", "/w==", "ValueError('v')", {"x": 1, "y": 2}],
        "(1, 2)": "tuple",
        "an integer of 19932 bits": "an integer of 19932 bits",
    }
    assert json.dumps(plain(given))


def test_a_value_with_too_many_parts_or_too_deep_is_refused(monkeypatch):
    monkeypatch.setattr(values, "MAX_VALUES", 1000)
    plain([0] * 999)
    with pytest.raises(TooLarge, match="more than 1000 parts"):
        plain([0] * 1000)
    twice = [0]
    for _ in range(40):  # small in memory, and without end as JSON
        twice = [twice, twice]
    with pytest.raises(TooLarge):
        plain(twice)
    deep = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(TooLarge):
        plain(deep)


def test_what_is_sent_has_no_half_characters_and_nothing_that_json_lacks():
    assert sendable({"a": ["\ud800é", (1, object)]}) == {"a": ["?é", (1, str(object))]}
    deep = []
    for _ in range(1000):
        deep = [deep]
    json.dumps(sendable(deep))
