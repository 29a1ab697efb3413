"""Tells clients that what they have read is not so any more: lists, transcripts, statistics.

In the newer era those hear of it that listen (`subscriptions/listen`), and of the older eras all clients that shook
hands; single resources are subscribed to in both. Looks every CHANGES_S, and only while somebody listens, so that a
hundred changes of a second are one notification.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import NotificationOptions
from mcp.server.mcpserver import MCPServer
from mcp.server.session import ServerSession
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)
from mcp_types import EmptyResult, NotificationParams, SubscribeRequestParams, UnsubscribeRequestParams

from mlx_mcp.api.mcp.calls import tenant
from mlx_mcp.api.mcp.resources import MODELS, SESSION, SESSIONS, STATS, unknown_resource
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.values import SessionInfo

CHANGES_S = 1.0


class Client:
    """A client that has shaken hands, and the resources that it has subscribed to."""

    def __init__(self, session: ServerSession) -> None:
        self.session = session
        self.uris: set[str] = set()


class Bus(InMemorySubscriptionBus):
    """Those of the newer era that listen; says when somebody does."""

    def __init__(self, listened: Callable[[], None]) -> None:
        super().__init__()
        self._listened = listened

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        """Have an event told to `listener`; returns what ends that."""
        end = super().subscribe(listener)
        self._listened()
        return end


class Changes:
    """What a server's clients are told of changes; one for each server.

    `stale` are the lists (tools, prompts, resources) of which they may have been told something else before, by a relay
    of another version or by the engine before this one: whoever listens first is told that these have changed. Nothing
    is known of sessions at first, so that one who was told that there are none hears of those there are.
    """

    def __init__(self, service: Service, stale: Collection[str] = ()) -> None:
        self._service, self._stale = service, stale
        self.bus = Bus(self._awake)
        self._clients: dict[int, Client] = {}  # by the connection
        self._listened = anyio.Event()
        self._sessions: dict[str, SessionInfo] = {}
        self._stats = service.engine.stats

    @asynccontextmanager
    async def lifespan(self, server: MCPServer[Any]) -> AsyncIterator[None]:
        """Watch as long as the server serves."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch)
            yield
            tasks.cancel_scope.cancel()

    def install(self, server: MCPServer[Any]) -> None:
        """Have the server note who is there, and say and do what the older eras have of this."""
        lowlevel = server._lowlevel_server  # MCPServer has nothing of it (mcp 2.3)
        told = NotificationOptions(prompts_changed=True, resources_changed=True, tools_changed=True)
        lowlevel.create_initialization_options = partial(  # type: ignore[method-assign]
            lowlevel.create_initialization_options, told
        )
        lowlevel.add_notification_handler("notifications/initialized", NotificationParams, self._note_client)
        lowlevel.add_request_handler("resources/subscribe", SubscribeRequestParams, self._subscribe)
        lowlevel.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, self._unsubscribe)

    def _awake(self) -> None:
        self._listened.set()

    async def _note_client(self, ctx: ServerRequestContext[Any, Any], params: NotificationParams) -> None:
        self._client(ctx)
        self._awake()

    async def _subscribe(self, ctx: ServerRequestContext[Any, Any], params: SubscribeRequestParams) -> EmptyResult:
        uri = str(params.uri)
        handle = uri.removeprefix(SESSION.format(id=""))
        if uri not in (MODELS, SESSIONS, STATS):
            try:
                if handle == uri:
                    unknown = f"Unknown resource: {uri}. resources/list has those there are."
                    raise unknown_resource(ctx.protocol_version, unknown, uri)
                await self._service.engine.session(tenant(), handle)
            except MlxMcpError as error:
                raise unknown_resource(ctx.protocol_version, str(error), uri) from error
        self._client(ctx).uris.add(uri)
        return EmptyResult()

    async def _unsubscribe(self, ctx: ServerRequestContext[Any, Any], params: UnsubscribeRequestParams) -> EmptyResult:
        self._client(ctx).uris.discard(str(params.uri))
        return EmptyResult()

    def _client(self, ctx: ServerRequestContext[Any, Any]) -> Client:
        """Who has sent something of the older eras, for as long as they are connected."""
        connection = ctx.session._connection
        if id(connection) not in self._clients:
            self._clients[id(connection)] = Client(ctx.session)
            connection.exit_stack.callback(self._clients.pop, id(connection), None)
        return self._clients[id(connection)]

    async def _watch(self) -> None:
        await self._listened.wait()
        while True:
            for event in self._look():
                await self._tell(event)
            await anyio.sleep(CHANGES_S)

    def _look(self) -> Iterable[ServerEvent]:
        """What has changed since the last look."""
        before, now = self._sessions, dict(known_sessions(self._service))
        stats_before, stats = self._stats, self._service.engine.stats
        self._sessions, self._stats = now, stats
        stale, self._stale = self._stale, ()
        if "tools" in stale:
            yield ToolsListChanged()
        if "prompts" in stale:
            yield PromptsListChanged()
        if "resources" in stale or before.keys() != now.keys():
            yield ResourcesListChanged()
            yield ResourceUpdated(SESSIONS)
        for handle in before.keys() | now.keys():
            was, is_ = before.get(handle), now.get(handle)
            if was is not None and (is_ is None or is_.num_tokens != was.num_tokens):
                yield ResourceUpdated(SESSION.format(id=handle))
        if stats != stats_before:
            yield ResourceUpdated(STATS)

    async def _tell(self, event: ServerEvent) -> None:
        await self.bus.publish(event)
        for client in list(self._clients.values()):
            if not client.session._connection.initialized.is_set():
                continue
            match event:
                case ToolsListChanged():
                    await client.session.send_tool_list_changed()
                case PromptsListChanged():
                    await client.session.send_prompt_list_changed()
                case ResourcesListChanged():
                    await client.session.send_resource_list_changed()
                case ResourceUpdated(uri):
                    if uri in client.uris:
                        await client.session.send_resource_updated(uri)
