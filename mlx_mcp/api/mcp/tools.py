"""The tools, as a calling model sees them."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import anyio
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult

from mlx_mcp.api.mcp.arguments import (
    MAX_BRANCHES,
    Arguments,
    BatchArguments,
    CloseArguments,
    CreateArguments,
    ForkArguments,
    GenerateArguments,
    PersistArguments,
)
from mlx_mcp.api.mcp.calls import ProgressReporter, StrictTool, tenant, translated, while_connected
from mlx_mcp.api.mcp.results import (
    Batch,
    Branch,
    Closed,
    Forks,
    Generation,
    ModelEntry,
    ModelList,
    NewSession,
    PersistedSession,
    SessionList,
    branch,
    closed_list,
    counts,
    generation,
    miss,
    persisted,
    reply,
    session_list,
)
from mlx_mcp.chat.message import Message
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.requests import GenerateRequest, Result
from mlx_mcp.errors import EngineDead, InvalidRequest, MlxMcpError
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader

BREAK = "\n\n"  # between files and prompt
EMBEDDED_NOTE = (
    "No model is configured, so the built-in one of 0.9M parameters serves: it recalls what it is told and no more. "
    "For real work have the server started as `mlx-mcp serve --model FOLDER_OR_HUB_ID`."
)
UNPINNED_NOTE = (
    "It is not pinned: pinned sessions may take half of the memory for keys and values. Close some of them, or have "
    "the server started with a larger max_kv_bytes."
)


def make_tools(
    client: EngineClient, registry: Registry, files: FileReader | None = None, activity: Activity | None = None
) -> list[Tool]:
    """The tools over one engine client, in the order in which hosts show them; without `files` none can be read."""
    tools = Tools(client, registry, files or FileReader((), 0, 0), activity or Activity())
    # Hosts run the calls of one turn in parallel only for read-only tools; generating changes nothing of a user's.
    harmless = {"read_only_hint": True, "destructive_hint": False}
    return [
        StrictTool.make(tools.generate, "Generate text", **harmless, idempotent_hint=False),
        StrictTool.make(tools.generate_batch, "Generate many texts", **harmless, idempotent_hint=False),
        StrictTool.make(tools.create_session, "Create a session", **harmless, idempotent_hint=False),
        StrictTool.make(tools.fork_session, "Fork a session", **harmless, idempotent_hint=False),
        StrictTool.make(
            tools.persist_session,
            "Persist a session",
            read_only_hint=False,
            destructive_hint=False,
            idempotent_hint=True,
        ),
        StrictTool.make(tools.list_sessions, "List sessions", **harmless, idempotent_hint=True),
        StrictTool.make(
            tools.close_session, "Close sessions", read_only_hint=False, destructive_hint=True, idempotent_hint=True
        ),
        StrictTool.make(tools.list_models, "List models", **harmless, idempotent_hint=True),
    ]


class Tools:
    """Each method is a tool; its docstring is what a calling model reads of it."""

    def __init__(self, client: EngineClient, registry: Registry, files: FileReader, activity: Activity) -> None:
        self._client, self._registry, self._files, self.activity = client, registry, files, activity

    @translated
    async def generate(self, given: GenerateArguments, ctx: Context) -> Annotated[CallToolResult, Generation]:
        """Generate text with a language model that runs on this machine; nothing leaves it.

        Use it to hand off work that needs no further tools: summaries, drafts, extraction, classification, a second
        opinion; calls may run in parallel, and many at once over one context go in generate_batch. The model sees
        `system`, `files` and `prompt`, and with `session` what was said there before: nothing else, no earlier calls.
        In a session send only what is new; system, tools and model are the session's.

        For data rather than prose give `json_schema`, `regex` or `grammar`: the answer then always parses, unless
        finish_reason is "length", which means that max_tokens cut it off. Returns {text, finish_reason, model,
        prompt_tokens, completion_tokens}; of the prompt cached_tokens were in memory, restored_tokens came from disk
        and computed_tokens were computed; {session} where it is kept; {reasoning}, {tool_calls} or {logprobs} where
        there are any; and {miss} where more was computed than was to be expected: with reason "diverged" the prompt
        went other ways than an earlier one after `before`, with `after` instead of `earlier`: keep what changes, such
        as a date, out of the beginning.

        The first call to a model loads it, which can take minutes; progress is reported. A failed or cancelled turn
        leaves its session as it was.
        """
        files = await self._read(given.files)
        keep = bool(given.session) if given.keep is None else given.keep
        request = given.request(
            chat(given.system, files, Message("user", given.prompt)),
            model=given.model or None,
            tools=tuple(given.tools or ()),
            tenant=tenant(),
            session=given.session,
            keep=keep,
            queue=given.queue,
            opens=SessionOptions() if keep and not given.session else None,
        )
        result = await self._run(ctx, request)
        return reply(generation(result, self._note(given.model or given.session)))

    @translated
    async def generate_batch(self, given: BatchArguments, ctx: Context) -> Annotated[CallToolResult, Batch]:
        """Answer many prompts at once over one shared context, which is computed once; for one prompt use generate.

        Use it to ask many things of one text, to do one thing to many texts, or with `n` and a temperature to draw
        several answers and choose. The context is a `session`, or `system` and `files`; no branch sees another's prompt
        or answer. At most 64 branches, prompts × n; they run as one batch.

        keep=false leaves the session as it is. keep=true keeps every branch in a session of its own, a fork of
        `session`, whose handle comes back to go on with. With a `seed` the answers to each prompt are drawn with
        seed, seed + 1, and so on.

        Returns {results, model}: the n answers to the first prompt, then to the second, and so on, each {text,
        finish_reason, session, cached_tokens, computed_tokens, completion_tokens}, without reasoning. A branch that
        fails has {error} alone and the others go on; its session, if any, is closed. Hosts refuse or file away results
        of more than about 25,000 tokens, and nothing is cut here: keep prompts × n × max_tokens below that.
        """
        count = len(given.prompts) * given.n
        if count > MAX_BRANCHES:
            raise InvalidRequest(
                f"{len(given.prompts)} prompts × n are {count} branches; there may be {MAX_BRANCHES}. Split the call."
            )
        if given.n > 1 and given.sampling().temperature == 0:
            raise InvalidRequest("At temperature 0 all n answers are the same. Give a temperature, say 0.8, or n=1.")
        files, branched = await self._read(given.files), bool(given.session)
        base = given.request(
            (),
            model=given.model or None,
            tenant=tenant(),
            session=given.session,
            keep=given.keep,
            opens=SessionOptions() if given.keep and not branched else None,
            # One lane: a batch has one caller's turns, however many branches it has.
            lane=f"batch {secrets.token_hex(8)}",
        )
        seed = base.sampling.seed
        requests = [
            replace(
                base,
                messages=chat(given.system, files, Message("user", prompt)),
                sampling=replace(base.sampling, seed=None if seed is None else (seed + i) % 2**32),
            )
            for prompt in given.prompts
            for i in range(given.n)
        ]
        run = self._run_forks if given.keep and branched else self._run_all
        outcomes = await while_connected(ctx, run(requests, ProgressReporter(ctx, self.activity, count)))
        failed = [outcome for outcome in outcomes if isinstance(outcome, MlxMcpError)]
        answered = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        if not answered:
            raise failed[0]
        results = [branch(o) if isinstance(o, Result) else Branch(error=str(o)) for o in outcomes]
        note = self._note(given.model or given.session)
        return reply(Batch(results=results, model=answered[0].model, note=note))

    @translated
    async def create_session(self, given: CreateArguments, ctx: Context) -> Annotated[CallToolResult, NewSession]:
        """Compute a context once, to go on from many times; nothing is generated.

        Use it before several calls that begin alike: the same system prompt, files or conversation. Then give each
        sub-agent a fork of it (fork_session), ask it with generate and keep=false, or ask many things at once with
        generate_batch: none of them computes the context again. For a single conversation generate with keep=true is
        enough.

        The context is `system`, then `files`, then `messages`; if it ends in a message of the user, or with the files,
        the prompts to come go on with that message. Returns {session, name, model, tokens} and how many of these were
        cached_tokens and computed_tokens. Handle and name work for all who share your access, such as your sub-agents.

        A session ends when it is closed, when it is not used for ttl_s, or, unless persist_session made it durable,
        with the server. Until then it can always go on; its cached keys and values may be evicted for others' sake, and
        are then computed again.
        """
        turns = [Message(message.role, message.content) for message in given.messages or ()]
        if turns and turns[-1].role == "user":
            turns[-1] = Message("user", turns[-1].text + BREAK)  # the prompts to come go on from here
        request = GenerateRequest(
            chat(given.system, await self._read(given.files), *turns),
            given.model or None,
            Sampling(max_tokens=1),
            tools=tuple(given.tools or ()),
            tenant=tenant(),
            opens=SessionOptions(given.name, given.ttl_s, given.pinned, given.ephemeral),
            context=True,
        )
        result = await self._run(ctx, request)
        session = result.session
        assert session is not None, "a context ends in its session"
        unpinned = given.pinned and not session.pinned
        created = NewSession(
            session=session.session_id,
            name=session.name or None,
            model=result.model,
            tokens=session.num_tokens,
            **counts(result),
            miss=miss(result.miss),
            note=" ".join(filter(None, (self._note(given.model), UNPINNED_NOTE if unpinned else None))) or None,
        )
        return reply(created)

    @translated
    async def fork_session(self, given: ForkArguments, ctx: Context) -> Annotated[CallToolResult, Forks]:
        """Make sessions that go on from where another one is, and then apart: one for each sub-agent or attempt.

        Takes no time and no memory however long the context is: nothing is copied or computed. A fork sees what the
        parent's finished turns said; of a turn that is under way it sees nothing. What either says later, the other
        does not see, and closing one leaves the other. A fork lives as long unused as its parent would, and is neither
        pinned nor persisted. At most 64 at once.

        Returns {sessions: [handles], names, model, tokens}; go on with generate(session=…). To ask once and keep
        nothing there is no need to fork: generate with keep=false.
        """
        names = tuple(given.names or ())
        count = given.count or len(names) or 1
        forks = await self._client.fork(tenant(), given.session, count, names, given.version)
        self.activity.sessions.update(fork.session_id for fork in forks)
        return reply(
            Forks(
                sessions=[fork.session_id for fork in forks],
                names=[fork.name for fork in forks] if names else None,
                model=forks[0].model,
                tokens=forks[0].num_tokens,
            )
        )

    @translated
    async def persist_session(
        self, given: PersistArguments, ctx: Context
    ) -> Annotated[CallToolResult, PersistedSession]:
        """Make a session durable: it survives a restart, a crash and a power cut, under the same handle.

        Use it for context that took long to build or is needed another day. Later turns are not kept until it is
        persisted again, which writes only what is new. It lies unencrypted on this machine for 30 days without use, or
        its ttl_s, or until close_session. Ephemeral sessions cannot be persisted.

        Returns {session, version, tokens, kept_tokens, written_bytes, expires_in_s} once it is safe; kept_tokens will
        not be computed again.
        """
        return reply(persisted(await self._client.persist(tenant(), given.session, given.version)))

    @translated
    async def list_sessions(self, given: Arguments, ctx: Context) -> Annotated[CallToolResult, SessionList]:
        """List your sessions, the ones used last first; of more than 100 the rest are counted in not_shown.

        Call it to find a handle again, or to see what can be closed. Returns {sessions: [{session, name, model, tokens,
        cached_tokens, busy, pinned, ephemeral, idle_s, expires_in_s, parent, persisted, versions}]}: cached_tokens are
        in memory now, busy means that a turn is under way.
        """
        return reply(session_list(await self._client.sessions(tenant())))

    @translated
    async def close_session(self, given: CloseArguments, ctx: Context) -> Annotated[CallToolResult, Closed]:
        """End sessions that are not needed any more, and remove what is on disk of them; there is no way back.

        Their turns that are under way or wait fail. Forks and parents go on. What is cached of them stays until there
        is need for room, and helps prompts that begin the same; that of an ephemeral session goes at once. If one of
        `sessions` is not there, none is closed. Returns {closed: [handles]}.
        """
        if given.all == bool(given.sessions):
            raise InvalidRequest(
                "Give the `sessions` to close, or all=true to close all of yours but persisted ones; one of the two."
            )
        closed = await self._client.close_sessions(tenant(), tuple(given.sessions or ()))
        return reply(closed_list(closed))

    @translated
    async def list_models(self, given: Arguments, ctx: Context) -> ModelList:
        """List the models that can be used: name, size, context length, and whether each is loaded.

        Call it to choose a model or after "model not found". The one with `default` answers when no model is named; one
        that is not loaded takes longer at its first call. Returns {models: [...]}.
        """
        loaded = self._client.stats.models
        entries = await asyncio.to_thread(self._registry.entries)
        return ModelList(
            models=[
                ModelEntry(
                    name=entry.spec.name,
                    default=entry.default,
                    loaded=entry.spec.name in loaded,
                    weights_mb=None if entry.weights_bytes is None else round(entry.weights_bytes / 1e6, 1),
                    context_tokens=entry.context_tokens,
                    about=entry.spec.summary,
                )
                for entry in entries
            ]
        )

    async def _run(self, ctx: Context, request: GenerateRequest) -> Result:
        return await while_connected(ctx, ProgressReporter(ctx, self.activity).follow(self._client, request))

    async def _run_all(self, requests: list[GenerateRequest], progress: ProgressReporter) -> list[Result | MlxMcpError]:
        """Run requests at once; one's failure is its own, unless the engine is gone."""

        async def run(index: int, request: GenerateRequest) -> Result | MlxMcpError:
            try:
                return await progress.follow(self._client, request, index)
            except EngineDead:
                raise
            except MlxMcpError as error:
                return error

        return await asyncio.gather(*(run(index, request) for index, request in enumerate(requests)))

    async def _run_forks(
        self, requests: list[GenerateRequest], progress: ProgressReporter
    ) -> list[Result | MlxMcpError]:
        """Run requests of one session at once, each on a fork of its own; forks that come to nothing are closed."""
        owner, session = requests[0].tenant, requests[0].session
        forking = asyncio.create_task(self._client.fork(owner, session, len(requests)))
        kept: set[str] = set()
        try:
            forks = await asyncio.shield(forking)  # a call that is cancelled meanwhile must know what to close
            forked = [replace(request, session=fork.session_id) for request, fork in zip(requests, forks, strict=True)]
            outcomes = await self._run_all(forked, progress)
            kept = {o.session.session_id for o in outcomes if isinstance(o, Result) and o.session is not None}
            return outcomes
        finally:
            with anyio.CancelScope(shield=True), suppress(MlxMcpError):
                unused = {fork.session_id for fork in await forking} - kept
                if unused:
                    await self._client.close_sessions(owner, tuple(unused))

    async def _read(self, paths: list[str] | None) -> str:
        return await asyncio.to_thread(self._files.read, paths) if paths else ""

    def _note(self, named: str) -> str | None:
        """What is to be said where the built-in model serves because nothing was configured or `named`."""
        return EMBEDDED_NOTE if not named and self._registry.nothing_configured else None


def chat(system: str, files: str, *turns: Message) -> tuple[Message, ...]:
    """The messages, with the files before the user's first, so that calls with the same files begin the same."""
    if files:
        opened = bool(turns) and turns[0].role == "user"
        turns = (Message("user", files + BREAK + (turns[0].text if opened else "")), *turns[opened:])
    return (Message("system", system), *turns) if system else turns
