"""What can be said to the tools about calls that go on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mlx_mcp.api.mcp.arguments import Arguments, LongArguments


class GetResultArguments(LongArguments):
    """Of `get_result`."""

    result_id: Annotated[str, Field(description="From a call that still runs; without one yours are listed.")] = ""
    offset: Annotated[
        int, Field(ge=0, strict=True, description="Read a result that is too long for one answer, from this character.")
    ] = 0


class CancelArguments(Arguments):
    """Of `cancel`."""

    result_id: Annotated[str, Field(description="Of the call to end.")]
