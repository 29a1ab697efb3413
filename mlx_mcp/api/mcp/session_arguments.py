"""What can be said to the tools that make sessions and end them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mlx_mcp.api.mcp.arguments import Arguments, ContextArguments, EarlierMessage, Functions, LongArguments, option
from mlx_mcp.service.context import Context
from mlx_mcp.service.values import MAX_FORKS, SessionOptions


class CreateArguments(ContextArguments):
    """Of `create_session`."""

    messages: Annotated[
        list[EarlierMessage] | None,
        Field(max_length=1024, description="Earlier ones; a last one of the user is what prompts go on."),
    ] = None
    name: Annotated[
        str, Field(description="Stands for the handle: 1 to 64 letters, digits, dots, dashes, underscores.")
    ] = ""
    ttl_s: Annotated[
        float | None,
        Field(gt=0, le=31_536_000, json_schema_extra=option("ttl_s (it ends after so long without use; a day)")),
    ] = None
    pinned: Annotated[bool, Field(json_schema_extra=option("pinned (true: never evicted, at the cost of others)"))] = (
        False
    )
    ephemeral: Annotated[
        bool, Field(json_schema_extra=option("ephemeral (true: what is cached of it goes at its end)"))
    ] = False
    tools: Functions = None

    def context(self) -> Context:
        """What is computed."""
        messages = tuple(message.to_message() for message in self.messages or ())
        return Context(self.system, tuple(self.files or ()), messages)

    def how(self) -> SessionOptions:
        """How the session is kept."""
        return SessionOptions(self.name, self.ttl_s, self.pinned, self.ephemeral)


class ForkArguments(Arguments):
    """Of `fork_session`."""

    session: Annotated[str, Field(description="Handle or name of the session or sandbox to go on from.")]
    count: Annotated[
        int | None, Field(ge=1, le=MAX_FORKS, strict=True, description="How many; else one for each name, or one.")
    ] = None
    names: Annotated[list[str] | None, Field(max_length=MAX_FORKS, description="A name for each.")] = None
    version: Annotated[str, Field(description="Go on from this version, which persist_session made.")] = ""


class PersistArguments(LongArguments):
    """Of `persist_session`."""

    session: Annotated[str, Field(description="Handle or name of the session.")]
    version: Annotated[str, Field(description="Keep a snapshot under this name too, for fork_session.")] = ""


class ListArguments(Arguments):
    """Of `list_sessions`."""

    text: Annotated[
        str, Field(max_length=1000, description="Only those in which this was said; of sandboxes, in code or output.")
    ] = ""


class CloseArguments(Arguments):
    """Of `close_session`."""

    sessions: Annotated[list[str] | None, Field(max_length=1024, description="Handles or names.")] = None
    all: Annotated[bool, Field(description="All of yours but persisted ones, instead of naming them.")] = False
    confirm: Annotated[bool, Field(description="Your user wants persisted ones deleted from disk too.")] = False
