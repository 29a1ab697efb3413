"""The table of families: the notations of their calls, the markers of their thoughts, and what they are known by.

The templates in llama.cpp's models/templates, the model cards, and the parsers of mlx_lm, vLLM and SGLang are the
sources; the cases of the package canitoolcall prove the families that it has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_mcp.chat.formats.format import CallSyntax, Marks, either
from mlx_mcp.chat.formats.gemma import GemmaCalls
from mlx_mcp.chat.formats.json_calls import JsonCalls, KimiCalls, NamedCalls
from mlx_mcp.chat.formats.minimax import SPACE, ElementCalls
from mlx_mcp.chat.formats.pythonic import LlamaCalls, PythonicCalls
from mlx_mcp.chat.formats.xml_calls import PairCalls, XmlCalls


@dataclass(frozen=True)
class Family:
    """A family's notation of calls, and how it is known: texts that its templates or vocabularies all have.

    `frame` are markers around its answers that say nothing, and `thoughts` markers that only this family has. Its
    makers may have it make calls within its thoughts.
    """

    calls: CallSyntax
    signs: tuple[str, ...]
    thoughts: tuple[Marks, ...] = ()
    frame: tuple[str, ...] = ()
    calls_in_thoughts: bool = False


def tags(begin: str) -> Marks:
    """An element's opening tag, and its closing one."""
    return Marks(begin, begin.replace("<", "</", 1))


def json_tags(
    name: str, begin: str, end: str = "", keys: tuple[str, str] = ("name", "arguments"), listed: bool = False
) -> JsonCalls:
    """JSON between two markers."""
    after = end or begin.replace("<", "</", 1)
    return JsonCalls(name=name, openers=(begin,), after=after, resume=after, keys=keys, listed=listed)


def pairs(name: str, prefix: str = "", suffix: str = "", separator: str = "", section: str = "") -> PairCalls:
    """Keys and values in turns, whose tags have a prefix or a suffix."""
    unit = tags(f"<{prefix}tool_call{suffix}>")
    return PairCalls(
        name=name,
        openers=(unit.begin,),
        after=unit.end,
        sections=(tags(section),) if section else (),
        key=tags(f"<{prefix}arg_key{suffix}>"),
        value=tags(f"<{prefix}arg_value{suffix}>"),
        separator=separator,
    )


def invokes(name: str, prefix: str, *sections: Marks, element: str = "invoke") -> XmlCalls:
    """`<invoke name="…"><parameter name="…">…</parameter></invoke>`, with a prefix in each tag."""
    return XmlCalls(
        name=name,
        openers=(f"<{prefix}{element} name=",),
        after=f"</{prefix}{element}>",
        sections=sections,
        parameter=Marks(f"<{prefix}parameter", f"</{prefix}parameter>"),
    )


QWEN_XML = XmlCalls(
    name="qwen-xml",
    openers=("<function=", "<function name="),
    after="</function>",
    sections=(tags("<tool_call>"),),
    within=("{",),
    parameter=Marks("<parameter", "</parameter>"),
    padded=True,
)
SEED_OSS = XmlCalls(
    name="seed-oss",
    openers=("<function=", "<function name="),
    after="</function>",
    sections=(tags("<seed:tool_call>"),),
    within=("{",),
    parameter=Marks("<parameter", "</parameter>"),
)
MINICPM = XmlCalls(
    name="minicpm",
    openers=("<function name=",),
    after="</function>",
    parameter=Marks("<param", "</param>"),
)
DSML = either(
    "dsml",
    invokes("dsml", "｜DSML｜", tags("<｜DSML｜tool_calls>"), tags("<｜DSML｜function_calls>")),
    invokes("dsml-4.1", "｜DSML｜ ", tags("<｜DSML｜ calls>"), tags("<｜DSML｜ tool_calls>")),
)
KIMI_K3 = XmlCalls(
    name="kimi-k3",
    openers=("<|open|>call ",),
    after="<|close|>call<|sep|>",
    sections=(Marks("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),),
    parameter=Marks("<|open|>argument", "<|close|>argument<|sep|>"),
    block=Marks('<|open|>json type="object"<|sep|>', "<|close|>json<|sep|>"),
    close="<|sep|>",
    escaped=True,
)
KIMI_K2 = KimiCalls(
    name="kimi-k2",
    openers=("<|tool_call_begin|>",),
    after="<|tool_call_end|>",
    sections=(Marks("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),),
    args="<|tool_call_argument_begin|>",
    resume="<|tool_call_end|>",
)
DEEPSEEK = NamedCalls(
    name="deepseek",
    openers=("<｜tool▁call▁begin｜>",),
    after="<｜tool▁call▁end｜>",
    sections=(Marks("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),),
    args="<｜tool▁sep｜>",
    resume="<｜tool▁call▁end｜>",
    kind="function",
)
DEEPSEEK_V3 = replace(DEEPSEEK, name="deepseek-v3", fenced=True)
SOLAR = NamedCalls(
    name="solar",
    openers=("<|tool_call:begin|>",),
    after="<|tool_call:end|>",
    named="<|tool_call:name|>",
    args="<|tool_call:args|>",
    resume="<|tool_call:end|>",
)
OLMO = PythonicCalls(name="olmo", openers=("<function_calls>",), after="</function_calls>", lines=True)
FUNCTIONARY = NamedCalls(
    name="functionary-v3.1", openers=("<function=",), after="</function>", resume="</function>", args=">"
)
LLAMA = LlamaCalls(name="llama", openers=("<|python_tag|>",), bare=("{", "["))
LLAMA_4 = PythonicCalls(name="llama-4", openers=("<|python_start|>",), after="<|python_end|>", bare=("[", "{"))
MISTRAL = NamedCalls(name="mistral", openers=("[TOOL_CALLS]",), args="[ARGS]", call_id="[CALL_ID]")
MISTRAL_V3 = replace(MISTRAL, name="mistral-v3", listed=True)
HERMES = json_tags("hermes", "<tool_call>")
LFM = PythonicCalls(name="lfm", openers=("<|tool_call_start|>",), after="<|tool_call_end|>")

# The first family whose signs are all there. Those with more of their own come first.
FAMILIES = (
    Family(
        ElementCalls(
            name="minimax-m3",
            openers=(f"{SPACE}<invoke ",),
            after=f"{SPACE}</invoke>",
            sections=(Marks(f"{SPACE}<tool_call>", f"{SPACE}</tool_call>"),),
        ),
        (SPACE,),
    ),
    Family(invokes("minimax-m2", "", tags("<minimax:tool_call>")), ("<minimax:tool_call>",)),
    Family(DSML, ("｜DSML｜",)),
    Family(
        KIMI_K3,
        ("<|open|>", "<|close|>", "<|sep|>"),
        (Marks("<|open|>think<|sep|>", "<|close|>think<|sep|>"),),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
    ),
    Family(KIMI_K2, ("<|tool_calls_section_begin|>",)),
    Family(DEEPSEEK_V3, ("<｜tool▁calls▁begin｜>", "```json")),
    Family(DEEPSEEK, ("<｜tool▁calls▁begin｜>",)),
    Family(
        SOLAR,
        ("<|tool_call:begin|>",),
        (Marks("<|think|>", "<|end|>"),),
        ("<|begin|>assistant", "<|content|>", "<|tool_calls|>", "<|calls|>", "<|end|>"),
    ),
    Family(
        GemmaCalls(name="gemma-4", openers=("<|tool_call>",), after="<tool_call|>", quote='<|"|>'),
        ("<|tool_call>", "<tool_call|>"),
        (Marks("<|channel>thought", "<channel|>"),),
    ),
    Family(
        GemmaCalls(
            name="function-gemma", openers=("<start_function_call>",), after="<end_function_call>", quote="<escape>"
        ),
        ("<start_function_call>",),
    ),
    Family(
        json_tags("cohere", "<|START_ACTION|>", "<|END_ACTION|>", ("tool_name", "parameters"), listed=True),
        ("<|START_ACTION|>",),
        frame=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    Family(
        JsonCalls(name="command-r", openers=("Action:",), keys=("tool_name", "parameters"), listed=True),
        ("Action:", "directly-answer"),
    ),
    Family(
        JsonCalls(
            name="apertus",
            openers=("<|tools_prefix|>",),
            after="<|tools_suffix|>",
            resume="<|tools_suffix|>",
            keyed=True,
            listed=True,
        ),
        ("<|tools_prefix|>",),
        calls_in_thoughts=True,
    ),
    Family(json_tags("internlm", "<|action_start|><|plugin|>", "<|action_end|>"), ("<|action_start|>", "<|plugin|>")),
    Family(
        JsonCalls(name="gigachat", openers=("<|function_call|>", "function call<|role_sep|>")),
        ("<|role_sep|>", "<|message_sep|>"),
        frame=("<|message_sep|>",),
    ),
    Family(json_tags("nemotron", "<TOOLCALL>", listed=True), ("<TOOLCALL>",)),
    Family(SEED_OSS, ("<seed:tool_call>",)),
    Family(pairs("longcat", prefix="longcat_"), ("<longcat_tool_call>",)),
    Family(MINICPM, ("<function name=", "<param name=")),
    Family(QWEN_XML, ("<function=", "<parameter=", "<tool_call>")),
    Family(pairs("glm"), ("<arg_key>", "<arg_value>")),
    Family(MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
    Family(MISTRAL_V3, ("[TOOL_CALLS]",)),
    Family(LFM, ("<|tool_call_start|>",)),
    Family(LFM, ("List of tools: [", "<|im_start|>")),
    Family(LFM, ("<|tool_list_start|>",)),
    Family(OLMO, ("<function_calls>",)),
    Family(json_tags("phi-4", "<|tool_call|>", "<|/tool_call|>", listed=True), ("<|tool_call|>", "<|/tool_call|>")),
    Family(
        JsonCalls(name="granite", openers=("<|tool_call|>", "<tool_call>"), listed=True),
        ("<|tool_call|>",),
        frame=("</tool_call>",),
    ),
    Family(json_tags("tool-calls", "<tool_calls>", listed=True), ("<tool_calls>",)),
    Family(HERMES, ("<tool_call>",)),
    Family(JsonCalls(name="firefunction", openers=("functools[",), listed=True), ("functools[",)),
    Family(FUNCTIONARY, ("<{start_tag}={function_name}>",)),
    Family(FUNCTIONARY, ("<function=", "</function>")),
    Family(LLAMA_4, ("<|python_start|>",)),
    Family(LLAMA, ("<|start_header_id|>", '"parameters": dictionary of argument name')),
    Family(LLAMA, ("<|python_tag|>",)),
)

# The markers of thoughts that several families have.
THOUGHTS = (
    tags("<think>"),
    Marks("[THINK]", "[/THINK]"),
    tags("<seed:think>"),
    tags("<mm:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),
    tags("<longcat_think>"),
    Marks("<|think:start|>", "<|think:end|>"),
    tags("<thinking>"),
    tags("<thought>"),
    Marks("◁think▷", "◁/think▷"),
)

# Apriel begins with these words, which only some of its templates have.
APRIEL = Marks("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]")
APRIEL_END = "[END FINAL RESPONSE]"

# What an answer may stand in, where the template asks for it in these words.
ENVELOPES = {"<response></response>": tags("<response>"), "<answer></answer>": tags("<answer>")}

# Control tokens that frame turns and texts. They say nothing where an answer has them, and are not shown.
TURNS = frozenset(
    "<s> </s> <bos> <eos> <pad> <unk> <sop> <eop> <|endoftext|> <|begin_of_text|> <|end_of_text|> "
    "<|startoftext|> <|im_start|> <|im_end|> <|im_sep|> <|im_user|> <|im_assistant|> <|im_system|> "
    "<|im_middle|> <|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> <|header_start|> "
    "<|header_end|> <|eot|> <|eom|> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] <start_of_turn> "
    "<end_of_turn> <|turn> <turn|> <|system|> <|user|> <|assistant|> <|observation|> <|end|> <|begin|> "
    "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> "
    "<BOS_TOKEN> <EOS_TOKEN> <PAD> <|start_of_role|> <|end_of_role|> <｜User｜> <｜Assistant｜> "
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜▁pad▁｜> <|role_end|> <role> </role> <|role_sep|> "
    "<|message_sep|> [e~[ ]~b] ]~!b[ <seed:bos> <seed:eos> <seed:pad> <|end_of_msg|> <sep> "
    "<beginning_of_sentence> <end_of_sentence> <|assistant_start|> <|assistant_end|> <|user_start|> "
    "<|user_end|> <|system_start|> <|system_end|> <|begin_assistant|> <|begin_user|> <|begin_system|> "
    "<|begin_content|> <|start|> <|return|> <|call|>".split()
)
