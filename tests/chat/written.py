"""The same two calls as the models of every family write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.detect import format_of
from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.message import ToolCall

LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "at": {"type": "string"},
        "times": {"type": "integer"},
        "far": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["at"],
}
STOP: dict[str, Any] = {"type": "object", "properties": {}}
TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
    {"type": "function", "function": {"name": "stop", "parameters": STOP}},
)
AT = '007 "é" & <b> {x}'
CALLS = [ToolCall("look", {"at": AT, "times": 2, "far": True, "tags": ["a", "b"]}), ToolCall("stop", {})]
ARGUMENTS = '{"at": "007 \\"é\\" & <b> {x}", "times": 2, "far": true, "tags": ["a", "b"]}'
THINK = ("<think>", "</think>")


def elements(prefix: str = "", element: str = "invoke", parameter: str = "parameter") -> str:
    """The calls as elements with names as attributes."""
    values = {"at": AT, "times": "2", "far": "true", "tags": '["a", "b"]'}
    inner = "".join(f'<{prefix}{parameter} name="{k}">{v}</{prefix}{parameter}>\n' for k, v in values.items())
    return (
        f'<{prefix}{element} name="look">\n{inner}</{prefix}{element}>\n'
        f'<{prefix}{element} name="stop">\n</{prefix}{element}>\n'
    )


def equals(padding: str) -> tuple[str, str]:
    """The calls as elements with names behind `=`."""
    values = {"at": AT, "times": "2", "far": "true", "tags": '["a", "b"]'}
    inner = "".join(f"<parameter={k}>{padding}{v}{padding}</parameter>\n" for k, v in values.items())
    return f"<function=look>\n{inner}</function>", "<function=stop>\n</function>"


def pairs(prefix: str = "", suffix: str = "", separator: str = "") -> str:
    """The calls as keys and values in turns."""
    values = {"at": AT, "times": "2", "far": "true", "tags": '["a", "b"]'}
    inner = "".join(
        f"<{prefix}arg_key{suffix}>{k}</{prefix}arg_key{suffix}>\n<{prefix}arg_value{suffix}>{v}</{prefix}arg_value{suffix}>\n"
        for k, v in values.items()
    )
    begin, end = f"<{prefix}tool_call{suffix}>", f"</{prefix}tool_call{suffix}>"
    return f"{begin}look{separator}\n{inner}{end}\n{begin}stop{separator}\n{end}"


def objects(name: str = "name", arguments: str = "arguments") -> tuple[str, str]:
    """The calls as JSON objects."""
    return f'{{"{name}": "look", "{arguments}": {ARGUMENTS}}}', f'{{"{name}": "stop", "{arguments}": {{}}}}'


def each(begin: str, end: str, calls: tuple[str, str]) -> str:
    """Each call between markers."""
    return "\n".join(f"{begin}{call}{end}" for call in calls)


def listed(begin: str, end: str, calls: tuple[str, str]) -> str:
    """The calls in a list between markers."""
    return f"{begin}[{', '.join(calls)}]{end}"


K3_VALUES = (
    ("at", "string", AT),
    ("times", "number", "2"),
    ("far", "boolean", "true"),
    ("tags", "array", '["a", "b"]'),
)
K3 = (
    "<|open|>tools<|sep|>"
    '<|open|>call tool="look" index="1"<|sep|>'
    + "".join(f'<|open|>argument key="{k}" type="{t}"<|sep|>{v}<|close|>argument<|sep|>' for k, t, v in K3_VALUES)
    + "<|close|>call<|sep|>"
    '<|open|>call tool="stop" index="2"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>'
)
M3 = "]<]minimax[>["
M3_CALLS = (
    f'{M3}<tool_call>\n{M3}<invoke name="look">{M3}<at>{AT}{M3}</at>{M3}<times>2{M3}</times>{M3}<far>true{M3}</far>'
    f"{M3}<tags>{M3}<item>a{M3}</item>{M3}<item>b{M3}</item>{M3}</tags>{M3}</invoke>\n"
    f'{M3}<invoke name="stop">{M3}</invoke>\n{M3}</tool_call>'
)
GEMMA = '{b}call:look{{at:{q}007 "é" & <b> {{x}}{q},times:2,far:true,tags:[{q}a{q},{q}b{q}]}}{e}{b}call:stop{{}}{e}'
PYTHON = ("look(at='007 \"é\" & <b> {x}', times=2, far=True, tags=['a', \"b\"])", "stop()")
HARMONY_HEAD = "<|start|>assistant<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"


@dataclass(frozen=True)
class Written:
    """How a family writes: what it is known by, the two calls, and the markers of its thoughts."""

    signs: tuple[str, ...]
    calls: str
    thoughts: tuple[str, str] = ("", "")
    answer: tuple[str, str] = ("", "")  # what stands around a text

    @property
    def form(self) -> Format:
        """The format that is recognised by the signs."""
        return format_of("\n".join(self.signs), ())


def known_by(*signs: str) -> tuple[str, ...]:
    """The signs of a family that thinks as most do."""
    return (*signs, *THINK)


FAMILIES: dict[str, Written] = {
    "hermes": Written(known_by("<tool_call>"), each("<tool_call>\n", "\n</tool_call>", objects()), THINK),
    "qwen-xml": Written(
        known_by("<tool_call>", "<function=", "<parameter="),
        each("<tool_call>\n", "\n</tool_call>", equals("\n")),
        THINK,
    ),
    "seed-oss": Written(
        ("<seed:tool_call>", "<seed:think>", "</seed:think>"),
        each("<seed:tool_call>\n", "\n</seed:tool_call>", equals("")),
        ("<seed:think>", "</seed:think>"),
    ),
    "glm": Written(known_by("<arg_key>", "<arg_value>"), pairs(), THINK),
    "longcat": Written(
        ("<longcat_tool_call>", "<longcat_think>", "</longcat_think>"),
        pairs("longcat_"),
        ("<longcat_think>", "</longcat_think>"),
    ),
    "hunyuan": Written(
        ("HYTK = ':opensource'",),
        f"<tool_calls:opensource>\n{pairs('', ':opensource', '<tool_sep:opensource>')}\n</tool_calls:opensource>",
        ("<think:opensource>", "</think:opensource>"),
    ),
    "minimax-m2": Written(
        known_by("<minimax:tool_call>"), f"<minimax:tool_call>\n{elements()}</minimax:tool_call>", THINK
    ),
    "minimax-m3": Written((M3, "<mm:think>", "</mm:think>"), M3_CALLS, ("<mm:think>", "</mm:think>")),
    "minicpm": Written(known_by("<function name=", "<param name="), elements("", "function", "param"), THINK),
    "dsml": Written(known_by("｜DSML｜"), f"<｜DSML｜tool_calls>\n{elements('｜DSML｜')}</｜DSML｜tool_calls>", THINK),
    "dsml-4.1": Written(known_by("｜DSML｜"), f"<｜DSML｜ calls>\n{elements('｜DSML｜ ')}</｜DSML｜ calls>", THINK),
    "deepseek": Written(
        known_by("<｜tool▁calls▁begin｜>"),
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        THINK,
    ),
    "deepseek-v3": Written(
        known_by("<｜tool▁calls▁begin｜>", "```json"),
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
        f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        THINK,
    ),
    "kimi-k2": Written(
        known_by("<|tool_calls_section_begin|>"),
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        f"{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{{}}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        THINK,
    ),
    "kimi-k3": Written(
        ("<|open|>", "<|close|>", "<|sep|>"),
        K3,
        ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
    ),
    "solar": Written(
        ("<|tool_call:begin|>",),
        f"<|begin|>assistant<|tool_calls|><|tool_call:begin|>c0<|tool_call:name|>look<|tool_call:args|>{ARGUMENTS}"
        "<|tool_call:end|><|tool_call:begin|>c1<|tool_call:name|>stop<|tool_call:args|>{}<|tool_call:end|><|calls|>",
        ("<|think|>", "<|end|>"),
        ("<|begin|>assistant<|content|>", "<|end|>"),
    ),
    "gemma-4": Written(
        ("<|tool_call>", "<tool_call|>"),
        GEMMA.format(q='<|"|>', e="<tool_call|>", b="<|tool_call>"),
        ("<|channel>thought", "<channel|>"),
    ),
    "function-gemma": Written(
        ("<start_function_call>",),
        GEMMA.format(q="<escape>", e="<end_function_call>", b="<start_function_call>"),
    ),
    "cohere": Written(
        ("<|START_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        listed("<|START_ACTION|>", "<|END_ACTION|>", objects("tool_name", "parameters")),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "command-r": Written(
        ("Action:", "directly-answer"), listed("Action:\n```json\n", "\n```", objects("tool_name", "parameters"))
    ),
    "apertus": Written(
        ("<|tools_prefix|>", "<|inner_prefix|>", "<|inner_suffix|>"),
        f'<|tools_prefix|>[{{"look": {ARGUMENTS}}}, {{"stop": {{}}}}]<|tools_suffix|>',
        ("<|inner_prefix|>", "<|inner_suffix|>"),
    ),
    "internlm": Written(
        ("<|action_start|>", "<|plugin|>"), each("<|action_start|><|plugin|>", "<|action_end|>", objects())
    ),
    "gigachat": Written(("<|role_sep|>", "<|message_sep|>"), each("<|function_call|>", "", objects())),
    "nemotron": Written(known_by("<TOOLCALL>"), listed("<TOOLCALL>", "</TOOLCALL>", objects()), THINK),
    "tool-calls": Written(
        ("<tool_calls>", "[BEGIN FINAL RESPONSE]"),
        listed("<tool_calls>", "</tool_calls>", objects()),
        ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ),
    "minimax-m1": Written(("<tool_calls>",), f"<tool_calls>\n{objects()[0]}\n{objects()[1]}\n</tool_calls>"),
    "mistral": Written(
        ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
        f"[TOOL_CALLS]look[CALL_ID]123456789[ARGS]{ARGUMENTS}[TOOL_CALLS]stop[ARGS]{{}}",
        ("[THINK]", "[/THINK]"),
    ),
    "mistral-v3": Written(("[TOOL_CALLS]",), listed("[TOOL_CALLS] ", "", objects())),
    "phi-4": Written(("<|tool_call|>", "<|/tool_call|>"), listed("<|tool_call|>", "<|/tool_call|>", objects())),
    "granite": Written(known_by("<|tool_call|>"), listed("<|tool_call|>", "", objects()), THINK),
    "firefunction": Written(("functools[",), listed("functools", "", objects())),
    "functionary-v3.1": Written(
        ("<function=", "</function>"), f"<function=look>{ARGUMENTS}</function><function=stop>{{}}</function>"
    ),
    "lfm": Written(known_by("<|tool_call_start|>"), listed("<|tool_call_start|>", "<|tool_call_end|>", PYTHON), THINK),
    "olmo": Written(("<function_calls>",), f"<function_calls>\n{PYTHON[0]}\n{PYTHON[1]}\n</function_calls>"),
    "llama": Written(("<|python_tag|>",), each("<|python_tag|>", "", objects("name", "parameters"))),
    "llama-4": Written(("<|python_start|>",), listed("<|python_start|>", "<|python_end|>", PYTHON)),
    "harmony": Written(
        ("<|channel|>", "<|message|>"),
        HARMONY_HEAD.format("look", ARGUMENTS) + HARMONY_HEAD.format("stop", "{}"),
        ("<|channel|>analysis<|message|>", "<|end|>"),
        ("<|start|>assistant<|channel|>final<|message|>", "<|end|>"),
    ),
    "muse": Written(
        ("<atem:function_calls>",),
        f"<|start|>assistant to=look<|message|><atem:function_calls>\n{elements('atem:')}</atem:function_calls><|eom|>",
        ("<|start|>assistant to=self<|message|>", "<|eom|>"),
        ("<|start|>assistant to=user<|message|>", "<|eom|>"),
    ),
    "functionary-v3.2": Written(
        (">>>${recipient}", r">>>all\n"), f">>>look\n{ARGUMENTS}>>>stop\n{{}}", answer=(">>>all\n", "")
    ),
}
