"""Writes the dialogs that the embedded model learns from.

Everything is drawn from one `random.Random`, so a seed names a dialog. Knows nothing of tokens or torch: a dialog is a
list of turns, and each answer says which skill it shows, so that training and evaluation read the same text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

UNKNOWN = "I do not know."
ACKNOWLEDGED = "OK."
IDENTITY = "I am the embedded model of mlx-mcp. I am very small: I recall what I am told."
LIMITS = "I am too small for that. I recall what I am told. Choose a real model for more."

NAMES = """Alice Bob Carol Dave Erin Frank Grace Henry Iris Jack Karen Liam Mona Nina Oscar Paula Quinn Rosa Sam Tina
Uma Victor Wendy Xena Yara Zoe Adam Bella Chris Diana Ethan Fiona George Hanna Ivan Julia Kevin Laura Marco Nora Otto
Peter Rita Simon Tara Vera Walter Anna Ben Clara""".split()
THINGS = """server printer router gateway vault locker safe project team office garage rocket robot camera ship laptop
database cluster backup garden kitchen library tower bridge engine""".split()
COLORS = "red blue green yellow purple orange black white brown pink grey silver golden violet".split()
WORDS = {
    "color": COLORS,
    "city": """Paris London Rome Berlin Madrid Vienna Oslo Lisbon Athens Dublin Tokyo Cairo Lima Boston Denver Prague
        Warsaw Milan Geneva Sydney""".split(),
    "pet": "cat dog parrot rabbit horse turtle hamster snake goat duck ferret pony".split(),
    "job": "baker doctor pilot teacher farmer painter lawyer singer nurse driver writer cook".split(),
    "food": "pizza soup rice pasta bread salad cheese curry stew noodles beans cake".split(),
    "drink": "tea coffee milk juice water cocoa cider lemonade soda beer wine".split(),
    "hobby": "chess tennis golf rowing dancing reading hiking skiing fishing sailing".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}
SPELLED = ["code", "number", "room", "port", "age", "key", "password", "nickname", "badge", "time"]
ATTRIBUTES = list(WORDS) + SPELLED
QUALIFIERS = "deploy launch backup secret main guest team test door bank spare night travel".split()
ADJECTIVES = "quiet old bright small heavy narrow early distant warm empty steady broken modern hidden".split()
NOUNS = """train river street market window forest harbor letter village wheel meadow mirror candle valley ladder
basket engine winter morning report plan meeting""".split()
VERBS = "leaves follows crosses reaches passes watches covers meets holds carries finds turns".split()
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
REQUESTS = """Write a poem.|Tell me a story.|Explain gravity.|Translate this into French.|Fix my code.|Write a function.
|Summarize the news.|What is the meaning of life?|Who won the game?|Plan my trip.|Give me an idea.|Tell me a joke.
|Write an essay.|Solve this equation.|What is the weather?|Recommend a book.""".replace("\n", "").split("|")

# What a fact is about reads as "Alice's code", "the code of the server" or, for a qualifier, "the deploy code".
OF_SUBJECT = ("{s}'s {a}", "the {a} of {s}")
OF_QUALIFIER = ("the {s} {a}",)
TELL = ("{fact} is {v}.", "{fact} is {v}.", "Remember that {fact} is {v}.", "{fact}: {v}.")
TELL_HAS = "{s} has the {a} {v}."
TELL_AGAIN = "{fact} is now {v}."
ASK = ("What is {fact}?",) * 4 + (
    "Tell me {fact}.",
    "{fact}?",
    "Look up {fact}.",
    "What's {fact}?",
    "Do you know {fact}?",
)
COPY = ("Copy: ", "Copy: ", "Repeat: ", "Say: ", "Repeat after me: ")
ASK_LIST = ("List the names.", "List everyone.", "Who was mentioned?")
ASK_COUNT = ("How many names?", "Count the names.", "How many people were mentioned?")
ASK_NUMBER = ("Who is number {k}?", "Name number {k}.")
ASK_BITS = ("Repeat the bits.", "What were the bits?")


@dataclass
class Turn:
    """One turn. `skill` names what an assistant turn shows; other turns have none."""

    role: str
    text: str
    skill: str = ""


@dataclass
class Mix:
    """How likely each kind of exchange is, and how the dialog is laid out."""

    recall: float = 1.0
    unknown: float = 0.2
    update: float = 0.1
    copy: float = 0.15
    bits: float = 0.0
    echo: float = 0.0
    tool: float = 0.15
    roster: float = 0.3
    count_up: float = 0.05
    chat: float = 0.06
    filler: float = 0.5
    max_facts: int = 24
    plain_rosters: bool = False  # a roster dialog names nobody but the people told of
    fresh_rosters: bool = False  # and asks for each part of the list once, so that no answer can be copied


@dataclass
class World:
    """What has been told so far in one dialog."""

    facts: dict[tuple[str, str], str] = field(default_factory=dict)
    asked: set[tuple[str, str]] = field(default_factory=set)
    numbers_asked: set[int] = field(default_factory=set)
    listed: bool = False
    bits: str = ""


def made_up(rng: random.Random, syllables: int) -> str:
    """A pronounceable word that no list holds, in lower case."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def a_name(rng: random.Random) -> str:
    """A person's name; two in five are made up."""
    return made_up(rng, rng.choice((2, 2, 3))).capitalize() if rng.random() < 0.4 else rng.choice(NAMES)


def a_subject(rng: random.Random) -> str:
    """What a fact is about: mostly a person, else a thing ("the server") or a qualifier ("deploy")."""
    kind = rng.random()
    if kind < 0.7:
        return a_name(rng)
    return "the " + rng.choice(THINGS) if kind < 0.85 else rng.choice(QUALIFIERS)


def a_value(rng: random.Random, attribute: str) -> str:
    """A value of the attribute; spelled ones are random, so that only the context can tell them."""
    if attribute in WORDS:
        return made_up(rng, 2) if rng.random() < 0.1 else rng.choice(WORDS[attribute])
    if attribute in ("code", "number", "port"):
        return str(rng.randrange(1000, 10000))
    if attribute in ("room", "badge"):
        return str(rng.randrange(100, 1000))
    if attribute == "age":
        return str(rng.randrange(10, 100))
    if attribute == "time":
        return f"{rng.randrange(1, 24)}:{rng.randrange(10, 60)}"
    if attribute == "key":
        return "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(2)) + str(rng.randrange(10, 100))
    return made_up(rng, rng.choice((2, 3)))


def capitalized(text: str) -> str:
    """The sentence with its first letter upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def a_filler(rng: random.Random) -> str:
    """A sentence that tells nothing anyone will be asked."""
    return (
        f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} "
        f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."
    )


def the_fact(rng: random.Random, subject: str, attribute: str) -> str:
    """The fact as a noun phrase, in one of its forms."""
    forms = OF_QUALIFIER if subject in QUALIFIERS else OF_SUBJECT
    return rng.choice(forms).format(s=subject, a=attribute)


def told(rng: random.Random, subject: str, attribute: str, value: str, again: bool = False) -> str:
    """A sentence that tells (or updates) a fact."""
    form = TELL_AGAIN if again else rng.choice(TELL)
    if not again and subject not in QUALIFIERS and rng.random() < 0.25:
        form = TELL_HAS
    return capitalized(form.format(s=subject, a=attribute, v=value, fact=the_fact(rng, subject, attribute)))


def asked(rng: random.Random, subject: str, attribute: str, lookup: bool = False) -> str:
    """A question for a fact; "Look up …" only if `lookup`, since with a tool of that name it calls the tool."""
    form = rng.choice(ASK)
    while form.startswith("Look") and not lookup:
        form = rng.choice(ASK)
    return capitalized(form.format(fact=the_fact(rng, subject, attribute)))


def a_text_to_copy(rng: random.Random, max_words: int = 12) -> str:
    """Words, made-up words, numbers, punctuation and accents, to be repeated as they stand."""
    words = []
    for _ in range(rng.randrange(2, max_words)):
        kind = rng.random()
        if kind < 0.4:
            words.append(rng.choice(NOUNS + VERBS + ADJECTIVES + COLORS))
        elif kind < 0.6:
            words.append(made_up(rng, rng.randrange(1, 4)))
        elif kind < 0.75:
            words.append(str(rng.randrange(0, 10 ** rng.randrange(1, 6))))
        elif kind < 0.9:
            words.append(rng.choice(NAMES) + rng.choice(",.;:!?-"))
        else:
            words.append("".join(rng.choice("abcxyzKQRäöüéßñλ中文✓€_/@#()[]{}<>*+=\"'&%") for _ in range(4)))
    return " ".join(words)


def enumerated(names: list[str]) -> str:
    """The answer to a list question; numbering each name makes the count the last number said."""
    return ", ".join(f"{i} {name}" for i, name in enumerate(names, 1)) + "."


def counted(names: list[str]) -> str:
    """The answer to a count question: the list, then the last number again."""
    return f"{enumerated(names)} {len(names)} in all."


def tool_call(name: str, arguments: dict[str, str]) -> str:
    """The model's call of a tool, as mlx_lm's json_tools parser reads it."""
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "</tool_call>"


def a_toolbox(rng: random.Random) -> dict[str, list[str]]:
    """One to three tools and their argument names; lookup(key) is common, the rest is made up or well known."""
    known = {"lookup": ["key"], "weather": ["city", "day"], "send": ["name", "text"], "search": ["query"]}
    tools = {"lookup": ["key"]} if rng.random() < 0.6 else {}
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.5:
            name = rng.choice(list(known))
            tools[name] = known[name]
        else:
            tools[made_up(rng, 2)] = [rng.choice([made_up(rng, 1), "name", "id", "city", "number"])]
    return tools


def tools_line(tools: dict[str, list[str]]) -> str:
    """How the chat template renders tools in the system turn."""
    return "Tools: " + ", ".join(f"{name}({', '.join(args)})" for name, args in tools.items()) + "."


def exchange_tool(rng: random.Random, tools: dict[str, list[str]]) -> Iterator[Turn]:
    """A request for a tool, the call, its result and the answer."""
    name = rng.choice(list(tools))
    if name == "lookup":
        subject, attribute = a_subject(rng), rng.choice(ATTRIBUTES)
        key = f"{subject}'s {attribute}" if rng.random() < 0.6 else subject
        request = rng.choice((f"Look up {key}.", f"Use lookup for {key}."))
        arguments = {"key": key}
    else:
        arguments = {argument: a_value(rng, rng.choice(ATTRIBUTES)) for argument in tools[name]}
        request = f"Call {name} with " + " and ".join(f"{k} {v}" for k, v in arguments.items()) + "."
    yield Turn("user", request)
    yield Turn("assistant", tool_call(name, arguments), "tool_call")
    result = a_value(rng, rng.choice(ATTRIBUTES))
    yield Turn("tool", result)
    yield Turn("assistant", result, "tool_result")


def exchange_roster(rng: random.Random, world: World, once: bool) -> Iterator[Turn]:
    """A list or count question over every person told of so far; several in a row when not `once`."""
    names = [subject for subject, _ in world.facts]
    for counting in [rng.random() < 0.5] if once else rng.sample((True, False), 2):
        yield Turn("user", rng.choice(ASK_COUNT if counting else ASK_LIST))
        answer, skill = (counted(names), "count") if counting else (enumerated(names), "list")
        yield Turn("assistant", answer, skill)


def exchange_number(rng: random.Random, world: World) -> Iterator[Turn]:
    """A question for one person by number: a part of the list, with the answer as the list has it."""
    names = [subject for subject, _ in world.facts]
    left = [k for k in range(1, len(names) + 2) if k not in world.numbers_asked]
    number = rng.choice(left)
    world.numbers_asked.add(number)
    yield Turn("user", rng.choice(ASK_NUMBER).format(k=number))
    yield Turn("assistant", f"{number} {names[number - 1]}" if number <= len(names) else UNKNOWN, "number")


def a_recall(rng: random.Random, world: World, mix: Mix, roster: bool, lookup: bool) -> Iterator[Turn]:
    """A question for a told fact or, at times, for one that nobody told; at times the same turn tells first."""
    before = ""
    if rng.random() < 0.2:
        before = " ".join(some_sentences(rng, mix, world, roster, max_facts=mix.max_facts)) + " "
    fresh = [fact for fact in world.facts if fact not in world.asked]
    subject, attribute = rng.choice(fresh if fresh and rng.random() < 0.8 else list(world.facts))
    if rng.random() < mix.unknown:
        if rng.random() < 0.5 and not (roster and mix.plain_rosters):
            subject = a_subject(rng)
        else:
            attribute = rng.choice(ATTRIBUTES)
    world.asked.add((subject, attribute))
    answer = world.facts.get((subject, attribute))
    yield Turn("user", before + asked(rng, subject, attribute, lookup))
    yield Turn("assistant", answer or UNKNOWN, "recall" if answer else "unknown")


def chat(rng: random.Random) -> Iterator[Turn]:
    """Small talk: who it is, and what it cannot do."""
    request, answer = rng.choice(
        (
            ("Who are you?", IDENTITY),
            ("What are you?", IDENTITY),
            ("What can you do?", IDENTITY),
            ("Hello.", "Hello."),
            ("Hi!", "Hello."),
            ("Thank you.", "You are welcome."),
            (rng.choice(REQUESTS), LIMITS),
            (rng.choice(REQUESTS), LIMITS),
        )
    )
    yield Turn("user", request)
    yield Turn("assistant", answer, "chat")


def count_up(rng: random.Random) -> Iterator[Turn]:
    """Counting aloud: the skill that gives an answer of any wished length."""
    first = rng.randrange(0, 90)
    last = min(99, first + rng.randrange(1, 14))
    yield Turn("user", f"Count from {first} to {last}.")
    yield Turn("assistant", " ".join(map(str, range(first, last + 1))), "count_up")


def some_bits(rng: random.Random) -> str:
    """Sixteen random bits: too little entropy to be copied by content, so only positions can tell them."""
    return " ".join(rng.choice("01") for _ in range(16))


def dialog(rng: random.Random, mix: Mix, max_tell_turns: int) -> Iterator[Turn]:
    """An endless dialog; the reader stops when it has enough.

    It opens with up to `max_tell_turns` turns that only tell: the more, the farther a question lies from its fact. A
    roster dialog tells one fact per person, so that "list the names" has one right answer.
    """
    world, roster = World(), rng.random() < mix.roster
    once = rng.random() < 0.5
    tools = a_toolbox(rng) if rng.random() < 3 * mix.tool else {}
    max_facts = rng.randrange(1, 1 + (min(10, mix.max_facts) if roster else mix.max_facts))
    opening = []
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 1 + max_facts)):
            opening.append(tell_new(rng, world, roster))
    if tools:
        opening.append(tools_line(tools))
    if opening:
        yield Turn("system", " ".join(opening))
    tell_turns = rng.randrange(1, 1 + max_tell_turns)
    while True:
        if tell_turns > 0 or not world.facts or (len(world.facts) < max_facts and rng.random() < 0.35):
            tell_turns -= 1
            yield from tell_turn(rng, mix, world, roster, max_facts)
        else:
            yield from ask_turn(rng, mix, world, roster, once, tools)


def tell_new(rng: random.Random, world: World, roster: bool) -> str:
    """Tell a fact that the world does not hold; in a roster, about a person not yet mentioned."""
    while True:
        subject = a_name(rng) if roster else a_subject(rng)
        if not roster and world.facts and rng.random() < 0.3:
            subject = rng.choice(list(world.facts))[0]
        attribute = rng.choice(ATTRIBUTES)
        if (subject, attribute) not in world.facts and not (roster and any(s == subject for s, _ in world.facts)):
            break
    world.facts[subject, attribute] = value = a_value(rng, attribute)
    return told(rng, subject, attribute, value)


def some_sentences(rng: random.Random, mix: Mix, world: World, roster: bool, max_facts: int) -> list[str]:
    """One to four sentences of facts, updates and filler."""
    sentences: list[str] = []
    for _ in range(rng.randrange(1, 5)):
        if (world.facts or mix.fresh_rosters) and rng.random() < mix.filler:
            sentences.append(a_filler(rng))
        elif world.facts and rng.random() < (0.0 if roster and mix.fresh_rosters else mix.update):
            subject, attribute = rng.choice(list(world.facts))
            world.facts[subject, attribute] = value = a_value(rng, attribute)
            sentences.append(told(rng, subject, attribute, value, again=True))
        elif len(world.facts) < max_facts:
            sentences.append(tell_new(rng, world, roster))
    return sentences or [a_filler(rng)]


def tell_turn(rng: random.Random, mix: Mix, world: World, roster: bool, max_facts: int) -> Iterator[Turn]:
    """A user's or tool's turn that only tells, acknowledged."""
    sentences = some_sentences(rng, mix, world, roster, max_facts)
    if rng.random() < mix.bits:
        world.bits = some_bits(rng)
        sentences.append(f"Bits: {world.bits}")
    yield Turn("tool" if rng.random() < 0.1 else "user", " ".join(sentences))
    yield Turn("assistant", ACKNOWLEDGED, "acknowledge")


def ask_turn(
    rng: random.Random, mix: Mix, world: World, roster: bool, once: bool, tools: dict[str, list[str]]
) -> Iterator[Turn]:
    """One exchange that asks for something."""
    kinds = {
        "recall": mix.recall,
        "copy": mix.copy,
        "bits": 2 * mix.bits,
        "echo": 2 * mix.echo,
        "tool": 3 * mix.tool if tools else 0.0,
        "roster": 3.0 * mix.roster if roster else 0.0,
        "count_up": mix.count_up,
        "chat": mix.chat,
        "filler": 0.1 * mix.filler,
    }
    if roster and mix.plain_rosters:
        kinds["copy"] = kinds["tool"] = 0.0
    if roster and mix.fresh_rosters:
        numbering = once and len(world.numbers_asked) <= len(world.facts)
        kinds["number"] = 4.0 if numbering else 0.0
        kinds["roster"] = 0.0 if once or world.listed else 4.0
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "copy":
        text = a_text_to_copy(rng)
        yield Turn("user", rng.choice(COPY) + text)
        yield Turn("assistant", text, "copy")
    elif kind == "bits":
        if not world.bits or rng.random() < 0.3:
            world.bits = some_bits(rng)
            yield Turn("user", f"Bits: {world.bits}")
            yield Turn("assistant", ACKNOWLEDGED, "acknowledge")
        yield Turn("user", rng.choice(ASK_BITS))
        yield Turn("assistant", world.bits, "bits")
    elif kind == "echo":
        bits = some_bits(rng)
        yield Turn("user", f"Echo: {bits}")
        yield Turn("assistant", bits, "echo")
    elif kind == "tool":
        yield from exchange_tool(rng, tools)
    elif kind == "roster":
        world.listed = True
        yield from exchange_roster(rng, world, once or mix.fresh_rosters)
    elif kind == "number":
        yield from exchange_number(rng, world)
    elif kind == "count_up":
        yield from count_up(rng)
    elif kind == "chat":
        yield from chat(rng)
    elif kind == "filler":
        yield Turn("user", " ".join(a_filler(rng) for _ in range(rng.randrange(1, 4))))
        yield Turn("assistant", ACKNOWLEDGED, "acknowledge")
    else:
        yield from a_recall(rng, world, mix, roster, lookup="lookup" not in tools)
