"""Which models can write programs, as far as that was tried: a file that the processes of a user share."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trials:
    """What is known of models, in a file that processes share; without a `path` it lasts as long as this does."""

    path: str = ""
    _own: dict[str, bool] = field(default_factory=dict)

    def known(self, model: str) -> bool | None:
        """Whether a model can write programs; None if it was not tried."""
        return (self._own | self._read()).get(model)

    def note(self, model: str, can: bool) -> None:
        """Note what a trial has shown. A file that cannot be written is left as it is: the next process tries again."""
        self._own[model] = can
        if not self.path:
            return
        part = f"{self.path}.{os.getpid()}"
        with suppress(OSError):
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
                json.dump(self._read() | {model: can}, file)
            os.replace(part, self.path)

    def _read(self) -> dict[str, bool]:
        if not self.path:
            return {}
        try:
            with open(self.path, "rb") as file:
                found = json.load(file)
        except (OSError, ValueError):  # not there, or damaged: nothing is known
            return {}
        return {name: can for name, can in found.items() if can in (True, False)} if isinstance(found, dict) else {}
