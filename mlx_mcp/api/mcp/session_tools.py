"""The tools about sessions: shapes and words, over what the service does."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult
from pydantic import BaseModel

from mlx_mcp.api.mcp.calls import SandboxToolSet
from mlx_mcp.api.mcp.consent import may_remove
from mlx_mcp.api.mcp.results import reply
from mlx_mcp.api.mcp.session_arguments import (
    CloseArguments,
    CreateArguments,
    ForkArguments,
    ListArguments,
    PersistArguments,
)
from mlx_mcp.api.mcp.workflow_results import Forked, Held, Kept, closed_with, forked, held_list, kept
from mlx_mcp.api.web.results import Closed, NewSession
from mlx_mcp.api.web.translate import closed_list, forks, new_session, persisted, session_list
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.activity import Report
from mlx_mcp.service.sessions import (
    close_sessions,
    create_session,
    find_sessions,
    fork_session,
    list_sessions,
    persist_session,
)
from mlx_mcp.service.transcripts import MAX_SEARCHED, said_in_them
from mlx_mcp.service.values import Origin
from mlx_mcp.workflows.sandbox.reading import run_in_them
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes


class SessionTools(SandboxToolSet):
    """Tools that make sessions and end them; those that fork, list and close take sandboxes by the same rules."""

    async def _known(self) -> Sandboxes:
        """The sandboxes, with those that are on disk."""
        await self._sandboxes.ready(self._service)
        return self._sandboxes

    async def create_session(self, given: CreateArguments, ctx: ToolContext) -> Annotated[CallToolResult, NewSession]:
        """Compute a context once, to go on from many times; nothing is generated.

        Before several calls that begin alike: the same system prompt, files or conversation. Give each sub-agent a fork
        (fork_session), or ask with generate_batch, or generate and keep=false: none computes the context again.

        Returns {session, name, model, tokens}. Handle and name work for all who share your access, such as sub-agents.
        A session ends when it is closed, when it is not used for ttl_s, or, unless persisted, with the server.
        """

        async def work(report: Report) -> BaseModel:
            tools = tuple(given.tools or ())
            made = await create_session(
                self._service, self._caller(ctx), given.context(), given.model, tools, given.how(), report
            )
            return new_session(made)

        return await self._long(ctx, given, "create_session", work, given.model)

    async def fork_session(self, given: ForkArguments, ctx: ToolContext) -> Annotated[CallToolResult, Forked]:
        """Make sessions that go on from where another is, and then apart: one for each sub-agent or attempt.

        Takes no time and no memory, however long the context is. A fork sees the parent's finished turns; then neither
        sees what the other says. At most 64 at once. Returns {sessions: [handles]}; go on with generate(session=…).
        """
        names, caller, known = tuple(given.names or ()), self._caller(ctx), await self._known()
        if known.knows(caller.tenant, given.session):
            made_of = (given.session, given.count, names, given.version)
            return reply(forked(await known.fork(self._service, caller, *made_of)))
        made = await fork_session(self._service, caller, given.session, given.count, names, given.version)
        return reply(Forked(**forks(made, bool(names)).model_dump()))

    async def persist_session(self, given: PersistArguments, ctx: ToolContext) -> Annotated[CallToolResult, Kept]:
        """Save a session or sandbox to disk: it survives a restart, a crash and a power cut, under the same handle.

        Use it to keep context that took long to build, or that is needed tomorrow. Later turns are not kept until it is
        persisted again, which writes only what is new. It lies unencrypted on this machine for 30 days without use, or
        its ttl_s, or until close_session. Ephemeral sessions cannot be persisted.

        Returns {session, version, tokens, kept_tokens, written_bytes, expires_in_s} once it is safe; kept_tokens will
        not be computed again.
        """

        async def work(report: Report) -> BaseModel:
            caller, known = self._caller(ctx), await self._known()
            if known.knows(caller.tenant, given.session):
                sandbox = known.get(caller.tenant, given.session)
                return kept(await known.keeping.persist(self._service, caller, sandbox, given.version))
            made = await persist_session(self._service, caller, given.session, given.version)
            return Kept(**persisted(made).model_dump())

        return await self._long(ctx, given, "persist_session", work)

    async def list_sessions(self, given: ListArguments, ctx: ToolContext) -> Annotated[CallToolResult, Held]:
        """List your sessions and sandboxes, the ones used last first; beyond 100 they are counted in not_shown.

        Call it to find a handle again, by a `text` that was said there (of the 200 used last of either kind; `asked`
        says when, and by which client), or to see what can be closed. Returns {sessions: [{session, name, model,
        tokens, cached_tokens, busy, pinned, ephemeral, idle_s, expires_in_s, parent, persisted, versions}]}:
        cached_tokens are in memory now, busy means that a turn is under way; and sandboxes: [{sandbox, name, variables,
        remembered, …}].
        """
        caller = self._caller(ctx)
        infos = await list_sessions(self._service, caller)
        origins: list[Origin | None] = []
        known = await self._known()
        await known.expire(self._service)
        held = known.infos(caller.tenant)
        if given.text:
            found = await said_in_them(self._service, caller, infos, given.text)
            infos, origins = [info for info, _ in found], [origin for _, origin in found]
            used_last = [known.get(caller.tenant, info.sandbox_id) for info in held[:MAX_SEARCHED]]
            held = [known.info(each) for each in await run_in_them(known.keeping, used_last, given.text)]
        return reply(held_list(session_list(infos), origins, held))

    async def close_session(self, given: CloseArguments, ctx: ToolContext) -> Annotated[CallToolResult, Closed]:
        """End and delete sessions and sandboxes that are not needed any more, on disk too; there is no way back.

        Their turns that are under way or wait fail. Forks and parents go on. What is cached of them stays until there
        is need for room, and helps prompts that begin the same; that of an ephemeral session goes at once. If one of
        `sessions` is not there, none is closed. Of persisted ones your user is asked. Returns {closed: [handles]}.
        """
        caller, known, asked = self._caller(ctx), await self._known(), given.sessions or []
        if given.all and not asked:
            sandboxes = [each for each in known.of(caller.tenant) if not each.kept.persisted]
        else:
            sandboxes = [known.get(caller.tenant, each) for each in asked if known.knows(caller.tenant, each)]
        sessions = tuple(each for each in asked if not known.knows(caller.tenant, each))
        infos = await find_sessions(self._service, caller, sessions)
        durable = [info.name or info.session_id for info in infos if info.persisted]
        durable += [each.name or each.sandbox_id for each in sandboxes if each.kept.persisted]
        if not await may_remove(ctx, durable, given.confirm):
            raise InvalidRequest(
                "Your user does not want what is on disk to be deleted, so no session was closed. Leave those sessions "
                "out; all=true closes only what is not on disk."
            )
        closed = []
        if sessions or given.all or not sandboxes:
            closed = await close_sessions(self._service, caller, sessions, given.all)
        await known.close(self._service, caller.tenant, sandboxes)
        return reply(closed_with(sandboxes, closed_list(closed)))
