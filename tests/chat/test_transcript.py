"""Who said what, out of a session's text."""

import pytest

from mlx_mcp.chat.transcript import Said, said_in

CHATML = [
    "",
    ["<|im_start|>"],
    "system\nBe short.",
    ["<|im_end|>"],
    "\n",
    ["<|im_start|>"],
    "user\nHi!",
    ["<|im_end|>"],
    "\n",
]
WRITTEN = {
    "ChatML": [*CHATML, ["<|im_start|>"], "assistant\nHello."],
    "Llama 3": [
        *[
            ["<|begin_of_text|>"],
            ["<|start_header_id|>"],
            "system",
            ["<|end_header_id|>"],
            "\n\nBe short.",
            ["<|eot_id|>"],
        ],
        *[["<|start_header_id|>"], "user", ["<|end_header_id|>"], "\n\nHi!", ["<|eot_id|>"]],
        *[["<|start_header_id|>"], "assistant", ["<|end_header_id|>"], "\n\nHello.", ["<|eot_id|>"], ""],
    ],
    "Gemma": [
        *[["<bos>"], ["<start_of_turn>"], "system\nBe short.", ["<end_of_turn>"], "\n"],
        *[
            ["<start_of_turn>"],
            "user\nHi!",
            ["<end_of_turn>"],
            "\n",
            ["<start_of_turn>"],
            "model\nHello.",
            ["<end_of_turn>"],
        ],
    ],
    "Mistral": [
        *[["<s>"], ["[SYSTEM_PROMPT]"], "Be short.", ["[/SYSTEM_PROMPT]"]],
        *[["[INST]"], "Hi!", ["[/INST]"], "Hello.", ["</s>"], ""],
    ],
    "Phi and GLM": [
        ["<|system|>"],
        "Be short.",
        ["<|end|>"],
        ["<|user|>"],
        "\nHi!",
        ["<|end|>"],
        ["<|assistant|>"],
        "Hello.",
    ],
    "DeepSeek": [
        *[["<｜begin▁of▁sentence｜>"], ["<|system|>"], "Be short.", ["<｜User｜>"], "Hi!"],
        *[["<｜Assistant｜>"], "Hello.", ["<｜end▁of▁sentence｜>"]],
    ],
    "Harmony": [
        *[["<|start|>"], "system", ["<|message|>"], "Be short.", ["<|end|>"]],
        *[
            ["<|start|>"],
            "user",
            ["<|message|>"],
            "Hi!",
            ["<|end|>"],
            ["<|start|>"],
            "assistant",
            ["<|message|>"],
            "Hello.",
        ],
    ],
}


@pytest.mark.parametrize("parts", WRITTEN.values(), ids=WRITTEN.keys())
def test_messages_are_told_apart_as_the_families_write_them(parts):
    assert said_in(parts) == [Said("system", "Be short."), Said("user", "Hi!"), Said("assistant", "Hello.")]


def test_what_a_template_marks_within_a_message_stays_in_its_text():
    parts = [*CHATML, ["<|im_start|>"], "assistant\n", ["<think>"], "Hm.", ["</think>"], "\n"]
    parts += [["<tool_call>"], '{"name": "f"}', ["</tool_call>"], ["<|im_end|>"]]
    assert said_in(parts)[-1] == Said("assistant", '<think>Hm.</think>\n<tool_call>{"name": "f"}</tool_call>')


def test_a_text_that_looks_like_a_header_is_none_within_a_message():
    assert said_in([["<|im_start|>"], "user\nuser\nassistant\nHi!", ["<|im_end|>"]]) == [
        Said("user", "user\nassistant\nHi!")
    ]


@pytest.mark.parametrize("parts", [["All in one."], [["<s>"], "All in one.", ["</s>"], ""]])
def test_without_a_mark_that_is_known_there_is_one_text_without_a_role(parts):
    assert said_in(parts) == [Said("", "All in one.")]


def test_nothing_was_said_in_an_empty_session():
    assert said_in([]) == said_in(["", ["<|im_start|>"], "assistant\n"]) == []


def test_what_is_said_in_a_turn_has_the_number_of_tokens_before_it():
    parts = [["", 0], *CHATML[:-2], ["", 6], " there!", *CHATML[-2:], ["<|im_start|>"], "assistant\nHello.", ["", 12]]
    parts += [*CHATML[-2:], ["<|im_start|>"], "user\nBye!"]
    assert said_in(parts) == [
        Said("system", "Be short.", 0),
        Said("user", "Hi!", 0),
        Said("user", "there!", 6),
        Said("assistant", "Hello.", 6),
        Said("user", "Bye!", 12),
    ]


def test_of_what_came_before_the_turns_that_are_known_the_turn_is_not():
    assert said_in(["All in one.", ["", 4], "More."]) == [Said("", "All in one."), Said("", "More.", 4)]
