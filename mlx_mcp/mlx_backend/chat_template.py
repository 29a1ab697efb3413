"""Renders chats by a model's chat template, and cuts turns out of what it renders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils

from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import NO_SWITCH, Reasoning
from mlx_mcp.core.ports import never
from mlx_mcp.errors import InvalidRequest, MlxMcpError
from mlx_mcp.mlx_backend.control_tokens import ControlTokens, MarkedText, unused_characters
from mlx_mcp.mlx_backend.reasoning_switch import Setting, find_settings
from mlx_mcp.mlx_backend.template_files import find_templates, template_for
from mlx_mcp.mlx_backend.template_proof import Proved, num_marks, proved
from mlx_mcp.mlx_backend.template_variables import of_makers
from mlx_mcp.mlx_backend.template_variants import Variant, variants
from mlx_mcp.mlx_backend.text_processes import Overdue, TextProcesses
from mlx_mcp.mlx_backend.text_worker import Worker

_tokenizer_utils: Any = tokenizer_utils  # which has no types
ARGUMENT = "69b9ca4cb42346d7"  # of calls that are made up for their results: where it is, a call is
NO_TEMPLATE = (
    "The model's folder has no chat template, so the prompt is the bare texts, one after another, without roles."
)
NO_ANSWERS = " It takes no answers, so there are no sessions with it: call without one."
OTHER_MESSAGES = " Change them, or choose another model (list_models shows them)."


@dataclass(frozen=True)
class Chat:
    """What is rendered: messages, and the messages of a session's turn that follow them, if there are any."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()  # function definitions in OpenAI's form
    reasoning: Reasoning | None = None
    gone: Callable[[], bool] = never  # whether nobody waits for it any more
    turn: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A rendered chat, generation prompt included."""

    marked: MarkedText
    turn_mark: str  # the character that stands where the turn begins
    ids: list[int] | None  # where the process that rendered the text encoded it too
    reasoning: bool  # it ends inside thoughts, which the template opened
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """A rendered chat in two parts: what comes before a turn, and the turn."""

    context: MarkedText
    turn: MarkedText
    reasoning: bool  # the turn ends inside thoughts, which the template opened
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """How a chat is to be rendered."""

    marks: str  # for the proof that nothing is left out; see template_proof
    num_chars: int  # of all texts, by which the time is limited
    encode: bool  # encode the text as well, where that can be done at once
    gone: Callable[[], bool]  # whether nobody waits for it any more


class ChatTemplate:
    """The chat template of one tokenizer; any thread may use it."""

    def __init__(self, tokenizer: Any, controls: ControlTokens, renderer: Renderer, form: Format, folder: Path) -> None:
        self._controls, self._renderer, self._format, self._folder = controls, renderer, form, folder
        stop_ids = frozenset(tokenizer.eos_token_ids)
        self._stops = [text for token_id, text in controls.texts.items() if token_id in stop_ids]
        self._settings: dict[Reasoning, Setting] = {}  # once they were asked for

    def turn_after(self, role: str, chat: Chat) -> Split:
        """The text of `chat.turn` after any log that ends in a message of this role; its messages do not matter.

        Raises:
            InvalidRequest: see `split`.
        """
        refused: InvalidRequest | None = None
        for each in possible(role, chat):
            try:
                return self.split(each)
            except InvalidRequest as error:
                refused = refused or error
                if isinstance(error.__cause__, Overdue):
                    break
        assert refused is not None, "there is a first"
        raise refused

    def split(self, chat: Chat) -> Split:
        """Render a chat, and split it where its turn begins.

        Raises:
            InvalidRequest: the template refuses the messages, knows no tools, or does not let a chat be continued.
        """
        rendered = self.render(chat)
        context, found, turn = rendered.marked.text.partition(rendered.turn_mark)
        if found and chat.turn[0].role == "tool":
            # The answer's own tokens end before the one that ended it.
            cuts = [context.rpartition(stop) for stop in self._stops]
            context, found, between = max(cuts, key=lambda cut: len(cut[0]), default=("", "", ""))
            turn = found + between + turn
            if ARGUMENT in turn:  # the one that was found ended another message
                found = ""
        if not found or rendered.turn_mark in turn:
            raise InvalidRequest(
                "The model's chat template drops or repeats what messages end with, so there are no sessions with this "
                "model. Call without one, with all that the model shall know in `prompt`."
            )
        marks = rendered.marked.marks
        return Split(MarkedText(context, marks), MarkedText(turn, marks), rendered.reasoning, rendered.notes)

    def render(self, chat: Chat) -> Rendered:
        """Render a chat, with marks for the control tokens in the callers' text, and one where the turn begins.

        Raises:
            InvalidRequest: the template refuses the messages or leaves some of them out, or knows no tools.
        """
        if chat.tools and not (self._renderer.can_render and self._format.calls):
            raise InvalidRequest(
                "This model cannot be given tools: how it would call them is not known. Choose another model "
                "(list_models shows them), or leave `tools` out and describe in `prompt` what to answer."
            )
        with self._told(chat):
            messages = [message.to_template() for message in chat.messages]
            following = [message.to_template() for message in chat.turn]
            plain = {"messages": messages, "tools": list(chat.tools)}
            text = json.dumps([plain, following], ensure_ascii=False)
            text.encode()  # refuses half surrogates, for which there are no tokens
            unused = unused_characters(text)
            turn_mark, marks = next(unused), self._controls.marks(unused)
            if following:
                plain["messages"] = continued(messages, turn_mark, following)
            marked = self._controls.marked(plain, marks)
            work = Work(proof_marks(unused, marked), len(text), not following and marked == plain, chat.gone)
            setting = self._setting(chat)
            variant, rendered, ids = self._fitting(marked["messages"], marked["tools"], setting, work)
            notes = (*variant.notes, *setting.notes, *(() if self._renderer.can_render else (NO_TEMPLATE,)))
            # In the copy too, where a caller's text cannot end in a marker.
            opened = all(self._format.opened_thoughts(text) is not None for text in (rendered.text, rendered.end))
            return Rendered(MarkedText(rendered.text, marks), turn_mark, ids, opened, notes)

    @contextmanager
    def _told(self, chat: Chat) -> Iterator[None]:
        """Have whatever the template raises become an error that says what to do."""
        try:
            yield
        except Overdue as error:
            raise InvalidRequest(
                f"The model's chat template or tokenizer ({self._folder}) cannot be used with these messages: {error}. "
                "Change them, choose another model (list_models shows them), or have the template mended."
            ) from error
        except MlxMcpError:
            raise
        except Exception as error:  # a template may fail in any way on what it does not expect
            raise InvalidRequest(
                f"These messages{' or tools' if chat.tools else ''} do not fit the model's chat template: "
                f"{str(error).rstrip('.')}.{self._advice(chat) or OTHER_MESSAGES}"
            ) from error

    def _fitting(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], setting: Setting, work: Work
    ) -> tuple[Variant, Proved, list[int] | None]:
        """Render messages in the first form in which the template leaves nothing out.

        Raises:
            InvalidRequest: it leaves something out of every one.
            Exception: what it said to the first form, if it refuses that.
        """
        refused: Exception | None = None
        lost: list[str] = []
        names = self._renderer.variables(bool(tools), work.gone)
        notation = partial(self._notation, work.gone)
        for variant in variants(with_words(messages, setting.words), tools, names, notation):
            try:
                given = setting.given | variant.given
                rendered, ids = self._renderer.render(variant.messages, variant.tools, given, work)
            except (Overdue, MlxMcpError):
                raise
            except Exception as error:  # a template may fail in any way on what it does not expect
                refused = refused or (None if lost else error)
                continue
            if not rendered.lost:
                return variant, rendered, ids
            lost = lost or rendered.lost
        if refused is not None:
            raise refused
        raise InvalidRequest(
            f"The model's chat template ({self._folder}) leaves out or changes {', '.join(dict.fromkeys(lost))}: the "
            "model would not see it. Leave it out, say it in `prompt`, or choose another model (list_models shows "
            "them)."
        )

    def _notation(self, gone: Callable[[], bool]) -> str:
        """A call of a tool as the template writes it; empty if it does not."""
        syntax = self._format.calls
        call = Message("assistant", tool_calls=(ToolCall("tool_name", {"argument": "value"}),))
        messages = [message.to_template() for message in (Message("user", "x"), call)]
        with suppress(InvalidRequest):
            variant, rendered, _ = self._fitting(messages, [], Setting(), sample_work(messages, gone))
            _, begin, rest = rendered.text.partition(syntax.begin if syntax else "\0")
            written, end, _ = rest.partition(syntax.end if syntax and syntax.end else "\0")
            if begin and end and not variant.notes:
                return begin + written + end
        return ""

    def _setting(self, chat: Chat) -> Setting:
        """How the template is asked for the kind of reasoning that the caller wants."""
        if chat.reasoning is None:
            return Setting()
        if not self._renderer.can_render:
            return Setting(notes=(NO_SWITCH,))
        if not self._settings:
            variables = self._renderer.variables(False, chat.gone)
            sample = [Message("user", "x").to_template()]
            work = sample_work(sample, chat.gone)

            def render(setting: Setting) -> str | None:
                try:
                    return self._fitting(sample, [], setting, work)[1].text
                except InvalidRequest:
                    return None
                except (Overdue, MlxMcpError):
                    raise
                except Exception:  # a template may fail in any way on what it does not expect
                    return None

            self._settings = find_settings(self._renderer.template(False), variables, render)
        return self._settings[chat.reasoning]

    def _advice(self, chat: Chat) -> str:
        """What to do without where the template refused answers; empty unless it takes the other messages."""
        rest = [message for message in chat.messages if message.role != "assistant"]
        if 0 < len(rest) < len(chat.messages):
            with suppress(InvalidRequest):
                self.render(replace(chat, messages=rest))
                return NO_ANSWERS
        return ""


class Renderer:
    """The chat templates of one model; any thread may use it.

    `processes` render, unless they are None: this package's own template is rendered here. Some tokenizers of mlx_lm
    and transformers render by code of theirs, with `lock` held.
    """

    def __init__(self, tokenizer: Any, processes: TextProcesses | None, lock: threading.Lock, folder: Path) -> None:
        self._tokenizer, self._processes, self._lock = tokenizer, processes, lock
        templates = find_templates(tokenizer, folder)
        self.all_text = "\n".join(templates.values())  # by which a model's family is known
        self._templates = {} if has_own_renderer(tokenizer) else templates
        self._here = Worker()
        self._can_encode = getattr(tokenizer, "backend_tokenizer", None) is not None  # where it renders
        self._variables: dict[str, dict[str, list[Any]]] = {}
        self.can_render = has_own_renderer(tokenizer) or bool(self._templates)

    def template(self, tools: bool) -> str:
        """The template of chats with or without tools; empty where code of another package renders them."""
        return template_for(self._templates, tools) or ""

    def variables(self, tools: bool, gone: Callable[[], bool]) -> dict[str, list[Any]]:
        """What the template can be given beside messages and tools; see template_variables.

        Raises:
            Failed or others: see TextProcesses.render.
        """
        template = self.template(tools)
        if not template:
            return {"enable_thinking": []} if self.can_render else {}  # mlx_lm gives it the name that is needed
        if template not in self._variables:
            processes = self._processes
            self._variables[template] = (
                self._here.variables(template) if processes is None else processes.variables(template, gone)
            )
        return self._variables[template]

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, given: dict[str, Any], work: Work
    ) -> tuple[Proved, list[int] | None]:
        """Render a chat, generation prompt included, with what else the template shall be `given`.

        Without any template it is the bare texts.

        Raises:
            Exception: the template refuses it, in any way; see TextProcesses.render.
        """
        asked: dict[str, Any] = {"messages": messages, "tools": tools}
        if not self.can_render:
            return Proved("\n\n".join(message["content"] for message in messages)), None
        template = self.template(bool(tools))
        if not template:
            return proved(lambda asked: self._render_by_code(asked, given), asked, work.marks), None
        asked |= {"documents": None, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
        asked |= self._tokenizer.special_tokens_map
        asked |= of_makers(self.variables(bool(tools), work.gone), tools or []) | given
        if self._processes is None:
            return self._here.rendered(template, asked, work.marks), None
        encode = work.encode and self._can_encode
        return self._processes.render(template, asked, work.num_chars, encode, work.gone, work.marks)

    def _render_by_code(self, asked: dict[str, Any], given: dict[str, Any]) -> str:
        with self._lock:
            text: str = self._tokenizer.apply_chat_template(
                asked["messages"], tools=asked["tools"], tokenize=False, add_generation_prompt=True, **given
            )
        return text


def has_own_renderer(tokenizer: Any) -> bool:
    """Whether mlx_lm or transformers renders its chats with code of theirs rather than with the model's template."""
    inner: Any = tokenizer._tokenizer
    return tokenizer._chat_template is not None or (
        type(inner).apply_chat_template is not _tokenizer_utils.PreTrainedTokenizerBase.apply_chat_template
    )


def proof_marks(unused: Iterator[str], given: dict[str, Any]) -> str:
    """Marks that show what of messages and tools is in a prompt."""
    return "".join(islice(unused, num_marks(given["messages"], given["tools"])))


def sample_work(messages: list[dict[str, Any]], gone: Callable[[], bool]) -> Work:
    """How a short chat is rendered that nobody has asked for."""
    return Work(proof_marks(unused_characters(""), {"messages": messages, "tools": []}), 1, False, gone)


def with_words(messages: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """The messages with words after the user's last one."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if not words or last is None:
        return messages
    said = messages[last] | {"content": f"{messages[last]['content']} {words}"}
    return [*messages[:last], said, *messages[last + 1 :]]


def possible(role: str, chat: Chat) -> Iterator[Chat]:
    """The shortest chats that end in a message of that role and go on with `chat.turn`, the one to try first first.

    Templates want results to answer calls. Some take one call in a message only, and some want calls to have ids, of
    nine letters or digits (Mistral's).
    """
    results = tuple(takewhile(lambda message: message.role == "tool", chat.turn))
    named = tuple(replace(result, call_id=result.call_id or f"{i:09}") for i, result in enumerate(results))
    # Without tools first: Mistral's templates would put them before the last user's message once more. Hermes's
    # templates cannot do without.
    for tools in ((), chat.tools) if chat.tools else ((),):
        for answered in (results, named) if named != results else (results,):
            calls = tuple(ToolCall(result.name, {"x": ARGUMENT}, result.call_id) for result in answered)
            for some in (calls, calls[:1]) if len(calls) > 1 else (calls,):
                answer = Message("assistant", tool_calls=some)
                messages = [Message("user", "x"), answer] if role == "assistant" else [Message("user", "")]
                yield replace(chat, messages=messages, tools=tools, turn=answered + chat.turn[len(results) :])


def continued(messages: list[dict[str, Any]], mark: str, turn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, and those of a turn after them, with `mark` where the turn begins; or in a result, at its text.

    Where the last message is the user's, the user's text goes on in that.
    """
    (*before, last), (first, *others) = messages, turn
    if first["role"] == "tool":
        return [*messages, first | {"content": mark + first["content"]}, *others]
    if last["role"] == "assistant":
        return [*before, last | {"content": last["content"] + mark}, *turn]
    return [*before, last | {"content": last["content"] + mark + first["content"]}, *others]
