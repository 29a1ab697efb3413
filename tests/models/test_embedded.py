"""The embedded model's chat template, with tools, as a caller's client fills it."""

import json

from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_mcp.models.registry import EMBEDDED_FOLDER

LOOKUP = {"name": "lookup", "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}}
PING = {"name": "ping"}


def rendered(messages, tools=None):
    tokenizer = load_tokenizer(EMBEDDED_FOLDER)
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)


def test_tools_go_at_the_end_of_the_system_turn():
    tools = [{"type": "function", "function": LOOKUP}, PING]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert rendered(messages, tools) == (
        "<|begin|><|system|>Be brief. Tools: lookup(key), ping().<|end|><|user|>Hi<|end|><|assistant|>"
    )


def test_without_a_system_turn_tools_get_one():
    assert rendered([{"role": "user", "content": "Hi"}], [LOOKUP]) == (
        "<|begin|><|system|>Tools: lookup(key).<|end|><|user|>Hi<|end|><|assistant|>"
    )


def test_a_call_and_its_result_are_rendered_as_they_were_learned():
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"key": "Alice"}}}
    as_text = {"function": {"name": "lookup", "arguments": json.dumps({"key": "Alice"})}}
    for tool_call in (call, as_text):
        messages = [
            {"role": "user", "content": "Look up Alice."},
            {"role": "assistant", "content": None, "tool_calls": [tool_call]},
            {"role": "tool", "content": "blue"},
        ]
        assert rendered(messages) == (
            "<|begin|><|user|>Look up Alice.<|end|>"
            '<|assistant|><tool_call>{"name": "lookup", "arguments": {"key": "Alice"}}</tool_call><|end|>'
            "<|tool|>blue<|end|><|assistant|>"
        )
