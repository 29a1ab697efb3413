"""Finds the chat templates of a model's folder, wherever its makers and converters keep them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

DEFAULT = "default"
TOOL_USE = "tool_use"
# Where a default template may be that transformers has not read: it reads neither file of a processor, and not
# tokenizer_config.json where there are additional_chat_templates/.
FILES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def find_templates(tokenizer: Any, folder: Path) -> dict[str, str]:
    """The templates by name: those that transformers has read, and what the folder has beside them."""
    templates = named(tokenizer.chat_template)
    for file in FILES:
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((folder / file).read_text(encoding="utf-8")).get("chat_template")
            templates = named(found) | templates
    return templates


def named(found: Any) -> dict[str, str]:
    """What stands for templates, by name: a text, a list of names and texts, or a dictionary of them."""
    match found:
        case str():
            return {DEFAULT: found} if found.strip() else {}
        case dict():
            return {name: text for name, text in found.items() if isinstance(text, str)}
        case list():
            each = (one for one in found if isinstance(one, dict))
            return named({one.get("name"): one.get("template") for one in each})
    return {}


def template_for(templates: dict[str, str], tools: bool) -> str | None:
    """The template of a chat with or without tools; where there is no such one, the one that there is."""
    wanted = (TOOL_USE, DEFAULT) if tools else (DEFAULT, TOOL_USE)
    return next((templates[name] for name in wanted if name in templates), next(iter(templates.values()), None))
