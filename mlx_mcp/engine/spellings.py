"""How models spelt their answers: with which of the token sequences that say the same.

A caller without a session sends the whole conversation again, as text. Encoded anew, an answer may have other tokens
than those that its model wrote, and everything from the first of them on would be computed once more. So the tokens
between two control tokens, a run, are put in place of others that decode to the same text:

    written    <|assistant|> [ un ][ able ] <|end|>
    encoded    <|assistant|> [ una ][ ble ] <|end|> <|user|> …
    given      <|assistant|> [ un ][ able ] <|end|> <|user|> …

A run is known by the control token before it and by its text, so that the model is told what the caller says, to the
letter. Nothing of it is another tenant's or another model's.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from mlx_mcp.core.ports import ChatTokenizer, LoadedModel

MAX_TOKENS = 1_000_000  # of all answers that are remembered; four bytes each
MAX_PENDING = 256  # answers that nobody has asked for yet
UNREADABLE = "\ufffd"  # stands for bytes that are no character: two such texts may be of different bytes
ANY = -1

Ids = Sequence[int]


@dataclass(frozen=True)
class Run:
    """Tokens without a control token among them, [start, end) of a sequence, and the control token before them."""

    opener: int
    start: int
    end: int


@dataclass(frozen=True)
class Written:
    """An answer, with the prompt that it was written to."""

    owner: bytes
    tokenizer: ChatTokenizer
    prompt: Ids
    output: Ids


class Spellings:
    """The latest answers of all models; any thread may ask."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._lock = threading.Lock()
        self._pending: deque[Written] = deque(maxlen=MAX_PENDING)
        self._runs: OrderedDict[bytes, array[int]] = OrderedDict()  # the least recently used first
        # How runs of answers begin, by owner: with a control token, then a template's token, or ANY of the model's.
        self._heads: set[tuple[bytes, int, int]] = set()

    def remember(self, tenant: str, model: LoadedModel, prompt: Ids, output: Ids) -> None:
        """Remember an answer. Costs nothing here: its text is looked at when the next prompt is encoded."""
        if output and model.tokenizer.control_ids:
            self._pending.append(Written(owner_of(tenant, model), model.tokenizer, prompt, tuple(output)))

    def respelt(self, tenant: str, model: LoadedModel, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of a whole prompt, with the answers in it as their model wrote them."""
        with self._lock:
            while self._pending:
                self._take(self._pending.popleft())
            owner, tokenizer, made, start = owner_of(tenant, model), model.tokenizer, list[int](), 0
            for run in runs(ids, tokenizer.control_ids):
                if self._heads.isdisjoint(((owner, run.opener, ids[run.start]), (owner, run.opener, ANY))):
                    continue  # of another role, and maybe long: its text need not be known
                key = key_of(owner, tokenizer, run.opener, ids[run.start : run.end])
                if key is not None and key in self._runs:
                    self._runs.move_to_end(key)
                    made += ids[start : run.start]
                    made += self._runs[key]
                    start = run.end
        return (*made, *ids[start:]) if made else ids

    def _take(self, written: Written) -> None:
        """Remember the runs of an answer; the first one began in its prompt."""
        controls, prompt = written.tokenizer.control_ids, written.prompt
        opened = next((i for i in reversed(range(len(prompt))) if prompt[i] in controls), len(prompt))
        ids, num_before = (*prompt[opened:], *written.output), len(prompt) - opened
        for run in runs(ids, controls):
            if run.end > num_before:
                head = ids[run.start] if run.start < num_before else ANY
                self._put(written, run.opener, head, ids[run.start : run.end])

    def _put(self, written: Written, opener: int, head: int, run: Ids) -> None:
        key = key_of(written.owner, written.tokenizer, opener, run)
        if key is None:
            return
        self._heads.add((written.owner, opener, head))
        self._num_tokens += len(run) - len(self._runs.pop(key, ()))
        self._runs[key] = array("I", run)
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= len(self._runs.popitem(last=False)[1])


def runs(ids: Ids, controls: frozenset[int]) -> Iterator[Run]:
    """The runs of a sequence that come after control tokens, without empty ones."""
    opener = None
    for i, token_id in enumerate((*ids, None)):
        if token_id is not None and token_id not in controls:
            continue
        if opener is not None and i > opener + 1:
            yield Run(ids[opener], opener + 1, i)
        opener = i


def owner_of(tenant: str, model: LoadedModel) -> bytes:
    """Whose answers they are: one tenant's, of one model, in the terms of one tokenizer."""
    return digest_of(tenant.encode(), model.name.encode(), model.tokenizer.digest)


def key_of(owner: bytes, tokenizer: ChatTokenizer, opener: int, run: Ids) -> bytes | None:
    """What a run is known by; None if its text does not tell its bytes.

    The control token is decoded with it: at the beginning of a text some tokenizers leave out a space.
    """
    text = tokenizer.decode((opener, *run))
    return None if UNREADABLE in text else digest_of(owner, text.encode())


def digest_of(*parts: bytes) -> bytes:
    """A digest of parts that no other parts have."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
