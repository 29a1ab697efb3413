"""Every error that leaves the package names a next step, and a test reaches it. `error_texts` finds their texts."""

import re
from functools import cache

import pytest

from tests.error_texts import GAP, PARTS, ROOT, RUN, Package, runs, strings_of_tests, words

VERBS = (
    "accept address ask begin call change check choose close connect convert correct create describe download edit end "
    "export fix free generate give go have import install kill leave let lift look lower make mount move name persist "
    "put raise read register remove rename restart retry run save say send serve set shorten show split start stop "
    "take try unload unset use wait write"
)
# An order, at the beginning of a sentence or of a part of one: "Lower max_tokens to 7 or less, or shorten the prompt."
ORDER = re.compile(rf"(?:^|[.:;,(?!\0]\s*|\b(?:or|and|then)\s+)(?:{VERBS.replace(' ', '|')})\b", re.IGNORECASE)
# Something to use, with what it does: "`mlx-mcp engine stop` ends it", "list_models shows them".
TO_USE = re.compile(
    r"`mlx-mcp [^`]*` |\b(?:list_\w+|get_result|persist_session) \w+s\b|\b\w+/list has\b|\bMLX_\w+ lists"
)
# What an argument, a setting or a part of a message has to be: "count is 65; it must be from 1 to 64."
MUST_BE = re.compile(r"\bmust (?:be|have)\b|\bmay have\b")

# Texts without a next step, and why.
NO_STEP = {
    "This engine keeps nothing on disk.": "the process that asks does it itself then, and nobody hears this",
    "Nobody waits for this any more.": "nobody hears it",
    "The client disconnected.": "the one who would hear it is gone",
    f"Error executing tool {GAP}: {GAP}": "the last part is an error of the tree, which names the step",
    f"it takes more than {GAP} GiB of memory": "from a template's process: `chat_template` says what to do",
    f"This {GAP} cannot be used: {GAP}\n{GAP}": "the last part is the step of one of KINDS; see a test below",
    f"no process can be started ({GAP})": "a note: the server serves in the process itself, and reads on from 'since'",
    f"the log {GAP} cannot be written ({GAP})": "such a note",
    "the system has no Unix sockets": "such a note",
    f"the folder {GAP} cannot be made ({GAP})": "such a note",
    f"there can be no Unix socket at {GAP} ({GAP})": "such a note",
}
# Texts that no test can look for, and why.
NO_TEST = {
    "Nobody waits for this any more.": "nobody hears it",
    "The client disconnected.": "the one who would hear it is gone; tests look at the rows that are free again",
    "it is no integer": "never shown: pydantic says it in its own words",
    "it has a fraction": "never shown: pydantic says it in its own words",
    "no YAML": "only if PyYAML did not say what is wrong, which it does",
    "Nothing is kept on disk. Have the server started with max_ssd_bytes above 0.": "only if a store that could not be "
    "opened left no error: its error is what is said",
}


@cache
def package():
    return Package(ROOT / "mlx_mcp")


@cache
def texts():
    return package().texts()


@cache
def runs_in_tests():
    """All runs of up to RUN words in the strings of tests."""
    return {
        tuple(part[i : i + length])
        for text in strings_of_tests(ROOT / "tests", but=("mutants", "test_errors.py", "error_texts.py"))
        for part in words(text)
        for length in range(1, RUN + 1)
        for i in range(len(part) - length + 1)
    }


def names_a_step(text):
    """Whether a text says what to do now: an order, a command or tool to use, or what a value has to be."""
    return any(each.search(text) for each in (ORDER, TO_USE, MUST_BE))


def shown(text):
    return text.replace(GAP, "…")


def test_everything_that_is_raised_is_known_as_an_error_or_as_none():
    unknown = package().unknown()
    assert not unknown, "\n".join(["add to MAKERS, or with the reason to INSIDE, in tests/error_texts.py:", *unknown])


def test_every_error_names_a_next_step():
    mute = {
        f"{text.where}: {shown(form)}"
        for text in texts()
        if text.maker not in PARTS
        for form in text.forms
        if form.strip(GAP + " ") and form not in NO_STEP and not names_a_step(form)
    }
    assert not mute, "\n".join(["say in each what to do now, in a way that names_a_step knows:", *sorted(mute)])


def test_every_error_is_looked_for_by_a_test():
    literals = {literal: text for text in reversed(texts()) for literal in text.literals}
    count: dict[tuple[str, ...], int] = {}
    for literal in literals:
        for run in runs(literal):
            count[run] = count.get(run, 0) + 1
    missing = []
    for literal, text in literals.items():
        own = {run for run in runs(literal) if count[run] == 1} or runs(literal)  # which no other error has
        if literal not in NO_TEST and not own & runs_in_tests():
            missing.append(f"{text.where}: {shown(literal)}")
    wanted = f"add tests that get these errors, and look for {RUN} words in a row that no other error has:"
    assert not missing, "\n".join([wanted, *sorted(missing)])


def test_every_exception_to_these_rules_is_still_an_error():
    forms = {form for text in texts() for form in text.forms}
    literals = {literal for text in texts() for literal in text.literals}
    assert [text for text in NO_STEP if text not in forms] == []
    assert [text for text in NO_TEST if text not in literals] == []


def test_every_kind_of_grammar_has_its_own_step():
    from mlx_mcp.mlx_backend.constraint import KINDS

    assert [step for _, step in KINDS.values() if not names_a_step(step)] == []


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("The prompt is empty. Say in `prompt` what the model should do.", True),
        ("It hangs: `mlx-mcp engine stop --force` ends it.", True),
        ("Model not found. list_models shows those there are.", True),
        ("count is 65; it must be from 1 to 64.", True),
        ("The disk is full.", False),
        ("Reading the cache folder failed: no such file.", False),
        ("The engine is about to end.", False),
    ],
)
def test_a_step_is_told_from_what_is_only_said(text, does):
    assert names_a_step(text) == does


def test_a_new_error_is_found_with_all_that_it_may_say(tmp_path):
    (tmp_path / "new.py").write_text(
        "from mlx_mcp.errors import ModelError\n"
        "STEP = 'Have it mended.'\n"
        "def fail(name, why=''):\n"
        "    told = 'It is blue.' if why else f'It is {why}.'\n"
        "    raise ModelError(f'{name} is broken. {told} ' + STEP)\n"
        "def other():\n"
        "    raise Surprise('boo')\n"
    )
    found = Package(tmp_path)
    [text] = found.texts()
    assert [shown(form) for form in text.forms] == [
        "… is broken. It is blue. Have it mended.",
        "… is broken. It is …. Have it mended.",
    ]
    assert [shown(each) for each in text.literals] == ["It is blue.", "Have it mended."]  # which have words enough
    assert [name.rpartition(": ")[2] for name in found.unknown()] == ["Surprise"]
