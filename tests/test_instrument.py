"""The embedded model is the instrument that later tests look at a cache with; here it is proved.

A cache that is damaged the way a broken block cache would damage it must change an answer, and an undamaged one never.
"""

import pytest

from tests.effort import drawn
from training.damage import DAMAGES, HARMLESS
from training.evaluate import EMBEDDED, Model, Script, bits, recall, scene_of
from training.grammar import World

NUM_DIALOGS = drawn(8, least=2)
MUST_SHOW = [
    "another dialog's cache",
    "foreign block over the target",
    "target block dropped",
    "target block zeroed",
    "another block dropped",
    "V of two blocks swapped",
    "V shifted one slot",
    "kv heads swapped",
    "stale tail of 16 tokens",
    "offset -1",
    "offset +2",
]


@pytest.fixture(scope="module")
def model():
    return Model(EMBEDDED)


@pytest.fixture(scope="module")
def probes(model):
    """Dialogs of 8 facts and of bits, 512 tokens each, with their caches."""
    made = []
    for index in range(NUM_DIALOGS):
        for probe, make in (("recall", recall(8, 512)), ("bits", bits)):
            case = make(Script(model.tokenizer, f"instrument-{probe}-{index}"))
            made.append((index, case, scene_of(model, case, f"instrument-{probe}-{index}")))
    return made


def dialogs_with_a_wrong_answer(model, probes, inflict):
    return {index for index, case, scene in probes if not model.answers(case, inflict(scene))}


@pytest.mark.long
@pytest.mark.parametrize("change", HARMLESS)
def test_an_undamaged_cache_never_changes_an_answer(model, probes, change):
    assert dialogs_with_a_wrong_answer(model, probes, HARMLESS[change]) == set()


# One test for all: tests of one file may run on several workers, and each would make the dialogs.
@pytest.mark.long
def test_every_damage_shows_in_recall_or_probe(model, probes):
    shown = {damage: dialogs_with_a_wrong_answer(model, probes, DAMAGES[damage]) for damage in MUST_SHOW}
    assert shown == {damage: set(range(NUM_DIALOGS)) for damage in MUST_SHOW}


def test_a_dialog_is_tokenized_as_the_chat_template_has_it(model):
    """What the model was trained on is what a caller's messages become."""
    from mlx_mcp.chat.message import Message
    from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer

    script = Script(model.tokenizer, "template")
    script.world = World({("Alice", "code"): "4821"})
    row = script.told(["Alice's code is 4821."], 40)
    case = script.recall(row, ("Alice", "code"))
    ids = [*case.context, *case.question]
    marks = {4: "user", 5: "assistant"}
    turns, role, start = [], None, 0
    for at, token in enumerate(ids):
        if token in marks:
            role, start = marks[token], at + 1
        elif token == 1:
            turns.append(Message(role, model.tokenizer.decode(ids[start:at])))
    assert ChatTokenizer(EMBEDDED, None).encode_chat(turns).ids == tuple(ids)
