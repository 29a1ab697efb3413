"""The resources: what there is to read beside the tools' results. JSON, but for a session's transcript, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from mcp import MCPError
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, Resource
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from mlx_mcp.api.mcp.calls import tenant
from mlx_mcp.api.mcp.icon import ICONS
from mlx_mcp.api.mcp.long_results import RESULT_URI
from mlx_mcp.api.mcp.results import compact, reply
from mlx_mcp.api.web.translate import model_list, session_list
from mlx_mcp.errors import EngineDead, MlxMcpError, UnknownResult, UnknownSandbox, UnknownSession
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.jobs import JobState
from mlx_mcp.service.models import list_models
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.sessions import list_sessions
from mlx_mcp.service.transcripts import Transcript, transcript
from mlx_mcp.service.values import Origin

RESULT = RESULT_URI.format("{id}")
MODELS, SESSIONS, SESSION, STATS = "mlx://models", "mlx://sessions", "mlx://sessions/{id}", "mlx://stats"
JSON, MARKDOWN = "application/json", "text/markdown"
RESOURCE_NOT_FOUND = -32002  # up to 2025-11-25; later versions have INVALID_PARAMS for it
MAX_LISTED = 100  # sessions in the list of resources; all can be read

P = ParamSpec("P")
R = TypeVar("R")


def add_resources(server: MCPServer[Any], service: Service) -> None:
    """Give a server the resources of a service. A caller sees the sessions of its own tenant and no others."""

    @server.resource(MODELS, title="Models", mime_type=JSON, icons=ICONS)
    @read
    async def models() -> str:
        """The models that can be used, as list_models returns them."""
        return model_list(await list_models(service)).model_dump_json(exclude_none=True)

    @server.resource(SESSIONS, title="Sessions", mime_type=JSON, icons=ICONS)
    @read
    async def sessions() -> str:
        """Your sessions, as list_sessions returns them."""
        return session_list(await list_sessions(service, Caller(tenant()))).model_dump_json(exclude_none=True)

    @server.resource(STATS, title="Statistics", mime_type=JSON, icons=ICONS)
    @read
    async def stats() -> str:
        """What the engine does: calls running and waiting, bytes of memory, tokens read and cached since its start."""
        counts = asdict(service.engine.stats)
        del counts["groups"]  # which connection does what concerns none of the others
        return json.dumps(counts)

    @server.resource(RESULT, name="result", title="Result of a long call", mime_type=JSON, icons=ICONS)
    @read
    async def result(id: str) -> str:
        """What a call returned that was answered with a handle, all of it."""
        job = service.jobs.get(tenant(), id)
        if job.state is JobState.RUNNING:
            raise ResourceError("The call still runs. get_result waits for it; then read this again.")
        outcome = reply(job.result())
        job.fetched = True
        return compact(outcome.structured_content)

    @server.resource(SESSION, name="session", title="Transcript of a session", mime_type=MARKDOWN, icons=ICONS)
    @read
    async def session(id: str) -> str:
        """What was said in a session of yours, by handle or name: a heading for each message, and its text.

        Before each turn stands when it was asked for, and by which client.
        """
        return as_markdown(await transcript(service, Caller(tenant()), id))


def session_resources(service: Service) -> list[Resource]:
    """The transcripts of the caller's sessions, those used last first."""
    mine = [info for info in known_sessions(service).values() if info.tenant == tenant()]
    mine.sort(key=lambda info: info.used_at, reverse=True)
    return [
        Resource(
            uri=SESSION.format(id=info.session_id),
            name=info.name or info.session_id,
            title=f"Session {info.name or info.session_id}",
            description=f"What was said in it: {info.num_tokens} tokens of {info.model}.",
            mime_type=MARKDOWN,
        )
        for info in mine[:MAX_LISTED]
    ]


def as_markdown(found: Transcript) -> str:
    """A transcript as a caller reads it."""
    info = found.info
    name = info.name or info.session_id
    head = f"# Session {name}\n\n{info.num_tokens} tokens of {info.model}, `{info.session_id}`\n"
    told: list[str] = [head]
    latest: Origin | None = None
    for said in found.messages:
        origin = found.origin(said)
        if origin is not None and origin != latest:
            told.append(f"\n`{origin.line}`\n")
        told.append(f"\n## {said.role or 'text'}\n\n{said.text}\n")
        latest = origin
    return "".join(told)


def unknown_resource(version: str | None, message: str, uri: object) -> MCPError:
    """The error for a resource that is not there, with the code that a protocol version has for it (SEP-2164)."""
    code = RESOURCE_NOT_FOUND if version in HANDSHAKE_PROTOCOL_VERSIONS else INVALID_PARAMS
    return MCPError(code, message, {"uri": str(uri)})


def read(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn this package's errors into those of a resource. Another tenant's session is an unknown one."""

    @wraps(function)
    async def translated(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await function(*args, **kwargs)
        except (UnknownResult, UnknownSession, UnknownSandbox) as error:
            raise ResourceNotFoundError(str(error)) from error
        except EngineDead as error:
            raise MCPError(INTERNAL_ERROR, str(error)) from error
        except MlxMcpError as error:
            raise ResourceError(str(error)) from error

    return translated
