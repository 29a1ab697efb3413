"""Counts the tokens of a prompt, as the model would be given it."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial

from mlx_mcp.engine.requests import Count
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context, chat
from mlx_mcp.service.generate import Options, request_of
from mlx_mcp.service.service import Service


async def count_tokens(service: Service, caller: Caller, context: Context, options: Options, report: Report) -> Count:
    """Count the tokens of a context, and of the session that it goes on with. The model is loaded if it is not.

    Raises:
        MlxMcpError: see EngineClient.count; InvalidRequest for files that cannot be read; and RateLimited.
    """
    service.limits.request(caller.tenant)
    request = request_of(caller, await chat(caller, context), options)
    meter = Meter()
    tell = partial(report, [meter])
    async with aclosing(service.engine.count(request)) as updates:
        async for update in updates:
            if isinstance(update, Count):
                return update
            meter.take(update)
            await tell()
    raise AssertionError("counting ends with a count or an error")
