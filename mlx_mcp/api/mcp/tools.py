"""The tools, as a calling model sees them: shapes and words, over what the service does."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult

from mlx_mcp.api.mcp.arguments import (
    Arguments,
    BatchArguments,
    CloseArguments,
    CreateArguments,
    ForkArguments,
    GenerateArguments,
    PersistArguments,
)
from mlx_mcp.api.mcp.calls import StrictTool, progress_reporter, tenant, translated, while_connected
from mlx_mcp.api.mcp.results import (
    Batch,
    Closed,
    Forks,
    Generation,
    ModelList,
    NewSession,
    PersistedSession,
    SessionList,
    reply,
)
from mlx_mcp.api.mcp.translate import (
    batch,
    closed_list,
    forks,
    generation,
    model_list,
    new_session,
    persisted,
    session_list,
)
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.batch import generate_batch
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.generate import generate
from mlx_mcp.service.models import list_models
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import (
    close_sessions,
    create_session,
    fork_session,
    list_sessions,
    persist_session,
)


def make_tools(service: Service, files: FileReader | None = None, activity: Activity | None = None) -> list[Tool]:
    """The tools over a service, in the order in which hosts show them; without `files` none can be read."""
    tools = Tools(service, files or FileReader((), 0, 0), activity or Activity())
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

    def __init__(self, service: Service, files: FileReader, activity: Activity) -> None:
        self._service, self._files, self.activity = service, files, activity

    @translated
    async def generate(self, given: GenerateArguments, ctx: ToolContext) -> Annotated[CallToolResult, Generation]:
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
        work = generate(self._service, self._caller(), given.context(), given.options(), progress_reporter(ctx))
        answered = await while_connected(ctx, work)
        return reply(generation(answered.result, answered.note))

    @translated
    async def generate_batch(self, given: BatchArguments, ctx: ToolContext) -> Annotated[CallToolResult, Batch]:
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
        context, options, report = given.context(), given.options(), progress_reporter(ctx)
        work = generate_batch(self._service, self._caller(), context, given.prompts, given.n, options, report)
        return reply(batch(await while_connected(ctx, work)))

    @translated
    async def create_session(self, given: CreateArguments, ctx: ToolContext) -> Annotated[CallToolResult, NewSession]:
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
        tools, options = tuple(given.tools or ()), given.options()
        work = create_session(
            self._service, self._caller(), given.context(), given.model, tools, options, progress_reporter(ctx)
        )
        return reply(new_session(await while_connected(ctx, work)))

    @translated
    async def fork_session(self, given: ForkArguments, ctx: ToolContext) -> Annotated[CallToolResult, Forks]:
        """Make sessions that go on from where another one is, and then apart: one for each sub-agent or attempt.

        Takes no time and no memory however long the context is: nothing is copied or computed. A fork sees what the
        parent's finished turns said; of a turn that is under way it sees nothing. What either says later, the other
        does not see, and closing one leaves the other. A fork lives as long unused as its parent would, and is neither
        pinned nor persisted. At most 64 at once.

        Returns {sessions: [handles], names, model, tokens}; go on with generate(session=…). To ask once and keep
        nothing there is no need to fork: generate with keep=false.
        """
        names = tuple(given.names or ())
        made = await fork_session(self._service, self._caller(), given.session, given.count, names, given.version)
        return reply(forks(made, bool(names)))

    @translated
    async def persist_session(
        self, given: PersistArguments, ctx: ToolContext
    ) -> Annotated[CallToolResult, PersistedSession]:
        """Make a session durable: it survives a restart, a crash and a power cut, under the same handle.

        Use it for context that took long to build or is needed another day. Later turns are not kept until it is
        persisted again, which writes only what is new. It lies unencrypted on this machine for 30 days without use, or
        its ttl_s, or until close_session. Ephemeral sessions cannot be persisted.

        Returns {session, version, tokens, kept_tokens, written_bytes, expires_in_s} once it is safe; kept_tokens will
        not be computed again.
        """
        return reply(persisted(await persist_session(self._service, self._caller(), given.session, given.version)))

    @translated
    async def list_sessions(self, given: Arguments, ctx: ToolContext) -> Annotated[CallToolResult, SessionList]:
        """List your sessions, the ones used last first; of more than 100 the rest are counted in not_shown.

        Call it to find a handle again, or to see what can be closed. Returns {sessions: [{session, name, model, tokens,
        cached_tokens, busy, pinned, ephemeral, idle_s, expires_in_s, parent, persisted, versions}]}: cached_tokens are
        in memory now, busy means that a turn is under way.
        """
        return reply(session_list(await list_sessions(self._service, self._caller())))

    @translated
    async def close_session(self, given: CloseArguments, ctx: ToolContext) -> Annotated[CallToolResult, Closed]:
        """End sessions that are not needed any more, and remove what is on disk of them; there is no way back.

        Their turns that are under way or wait fail. Forks and parents go on. What is cached of them stays until there
        is need for room, and helps prompts that begin the same; that of an ephemeral session goes at once. If one of
        `sessions` is not there, none is closed. Returns {closed: [handles]}.
        """
        sessions = tuple(given.sessions or ())
        return reply(closed_list(await close_sessions(self._service, self._caller(), sessions, given.all)))

    @translated
    async def list_models(self, given: Arguments, ctx: ToolContext) -> ModelList:
        """List the models that can be used: name, size, context length, sampling defaults, and whether each is loaded.

        Call it to choose a model or after "model not found". The one with `default` answers when no model is named; one
        that is not loaded takes longer at its first call. Returns {models: [...]}.
        """
        return model_list(await list_models(self._service))

    def _caller(self) -> Caller:
        return Caller(tenant(), self.activity, self._files)
