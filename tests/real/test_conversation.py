"""Long contexts: ten turns of one session, and thousands of tokens, beside mlx_lm over the whole of it."""

from tests.real.beside import BOUND, behind
from tests.real.product import hosting
from tests.real.prompts import EFFORT

TURNS = [
    "Hello! My name is Anna and I live in Oslo.",
    "What is my name?",
    "Which city do I live in?",
    "Tell me one fact about that city.",
    "Now write it in French.",
    "What is 12 plus 30?",
    "And minus two?",
    "Write two lines of a poem about snow.",
    "Make it funny.",
    "Say goodbye to me, with my name.",
]
TURN_TOKENS, CONTEXT_TOKENS = (20, 6000) if EFFORT >= 1 else (10, 2000)
NEEDLE = "The password of the archive is 'marmalade'."


async def test_ten_turns_are_those_of_mlx_lm_over_the_whole_conversation_and_each_computes_what_is_new(
    product, reference
):
    chat, starts, answers = [], [], []
    session, before = {"keep": True}, 0
    async with hosting(product) as host:
        for text in TURNS:
            chat.append(("user", text))
            starts.append(len(reference.prompt(*chat)))
            answer = await host.generate(text, max_tokens=TURN_TOKENS, **session)
            assert answer["prompt_tokens"] == starts[-1]
            if before:
                assert answer["cached_tokens"] >= before - 1  # the last token of an answer was never fed to the model
                assert answer["computed_tokens"] <= starts[-1] - before + 1
                assert "miss" not in answer
            session, before = {"session": answer["session"]}, starts[-1] + answer["completion_tokens"]
            chat.append(("assistant", answer["text"]))
            answers.append(answer)
        await host.call("close_session", sessions=[session["session"]])
    whole = reference.prompt(*chat)
    logits = reference.logits(whole[: starts[0]], whole[starts[0] :])
    gaps = behind(logits, whole[starts[0] :])
    for start, answer in zip(starts, answers, strict=True):
        ids = reference.encode(answer["text"]) + [reference.end] * (answer["finish_reason"] == "stop")
        assert whole[start : start + len(ids)] == ids
        assert gaps[start - starts[0] :][: len(ids)].max() <= BOUND, answer


async def test_thousands_of_tokens_of_context_are_read_as_mlx_lm_reads_them_and_only_once(product, reference):
    notes = [NEEDLE]
    while (num_tokens := len(reference.prompt(("user", "\n".join(notes))))) < CONTEXT_TOKENS:
        day = len(notes)
        notes += [
            f"On day {i} the ship carried {i * 37 % 900} crates of tea to port {i % 11}." for i in range(day, day + 9)
        ]
    questions = ["What is the password of the archive?", "What did the ship carry?"]
    async with hosting(product) as host:
        for index, question in enumerate(questions):
            text = "\n".join([*notes, question])
            answer = await host.generate(text, max_tokens=16)
            prompt = reference.prompt(("user", text))
            assert answer["prompt_tokens"] == len(prompt)
            assert (answer["cached_tokens"] > CONTEXT_TOKENS - 100) == (index > 0)
            assert answer["cached_tokens"] + answer["computed_tokens"] == len(prompt) > num_tokens
            assert reference.gap(prompt, answer) <= BOUND, answer
