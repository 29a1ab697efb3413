import itertools
import random

from mlx_lm.tokenizer_utils import load as load_tokenizer

from training import grammar
from training.evaluate import EMBEDDED


def turns(seed, count=60, **mix):
    return list(itertools.islice(grammar.dialog(random.Random(seed), grammar.Mix(**mix), 4), count))


def test_a_seed_names_a_dialog():
    assert turns("a") == turns("a") != turns("b")


def test_every_skill_occurs():
    seen = {turn.skill for seed in range(60) for turn in turns(seed, bits=0.1, echo=0.1, fresh_rosters=seed % 2 == 0)}
    skills = "acknowledge bits chat copy count count_up echo list number recall tool_call tool_result unknown"
    assert seen - {""} == set(skills.split())


def test_a_recall_answer_was_told_and_an_unknown_one_was_not():
    for seed in range(40):
        told = ""
        for question, answer in itertools.pairwise(turns(seed)):
            told += question.text + " "
            if answer.skill == "recall":
                assert answer.text in told
            elif answer.skill == "unknown":
                assert answer.text == grammar.UNKNOWN


def test_a_roster_lists_each_person_once_in_the_order_told():
    for seed in range(40):
        said = ""
        for turn in turns(seed, roster=1.0, plain_rosters=True):
            if turn.skill in ("list", "count"):
                names = [item.split(" ")[1] for item in turn.text.split(".")[0].split(", ")]
                assert len(set(names)) == len(names)
                assert [said.index(name) for name in names] == sorted(said.index(name) for name in names)
            elif turn.role != "assistant":
                said += turn.text + " "


def test_a_tool_call_is_what_mlx_lms_parser_reads():
    tokenizer = load_tokenizer(EMBEDDED)
    assert tokenizer.has_tool_calling
    text = grammar.tool_call("weather", {"city": "Paris", "day": "Monday"})
    inner = text.removeprefix(tokenizer.tool_call_start).removesuffix(tokenizer.tool_call_end)
    parsed = tokenizer.tool_parser(inner, None)
    assert (parsed["name"], parsed["arguments"]) == ("weather", {"city": "Paris", "day": "Monday"})
