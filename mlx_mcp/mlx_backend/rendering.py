"""Applies chat templates: in another process, in this one, or by code of mlx_lm or transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils

from mlx_mcp.mlx_backend.template_files import find_templates, template_for
from mlx_mcp.mlx_backend.template_proof import Proved, proved
from mlx_mcp.mlx_backend.template_variables import of_makers
from mlx_mcp.mlx_backend.text_processes import TextProcesses
from mlx_mcp.mlx_backend.text_worker import Worker

_tokenizer_utils: Any = tokenizer_utils  # which has no types


@dataclass(frozen=True)
class Work:
    """How a chat is to be rendered."""

    marks: str  # for the proof that nothing is left out; see template_proof
    num_chars: int  # of all texts, by which the time is limited
    encode: bool  # encode the text as well, where that can be done at once
    gone: Callable[[], bool]  # whether nobody waits for it any more


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
