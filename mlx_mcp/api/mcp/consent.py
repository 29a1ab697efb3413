"""Asks the user, through the host, before something is done that was not asked for in so many words.

In the newer era the question is the answer to the call, and the host calls again with the user's reply: `ask` raises
`Asking`, whose `result` the tool returns, and when it is called again it finds the reply. In the older eras the
question is a request to the host in the middle of the call. A host that cannot ask is never asked.

`ask` must come before anything of the call is done, since the call begins anew with the reply.
"""

from __future__ import annotations

from typing import Any

from mcp.server.elicitation import AcceptedElicitation
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ElicitRequest, ElicitRequestFormParams, ElicitResult, InputRequiredResult
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, Field

KEY = "consent"


class Consent(BaseModel):
    """What the user fills in."""

    go_ahead: bool = Field(description="Go ahead?", title="Go ahead")


class Asking(Exception):
    """The call ends here with a question, and comes again with the reply; `result` is what the tool returns."""

    def __init__(self, question: str, about: str) -> None:
        asked = ElicitRequestFormParams(message=question, requested_schema=Consent.model_json_schema())
        # The SDK seals the state, and opens it only for the same call.
        self.result = InputRequiredResult(input_requests={KEY: ElicitRequest(params=asked)}, request_state=about)
        super().__init__(question)


def can_ask(context: Context[Any, Any]) -> bool:
    """Whether the host can put a question to its user."""
    capabilities = context.client_capabilities
    can = None if capabilities is None else capabilities.elicitation
    return can is not None and (can.form is not None or can.url is None)


async def ask(context: Context[Any, Any], question: str, about: str) -> bool | None:
    """Whether the user consents; None if the host cannot ask. Only a reply to a question `about` the same counts.

    Raises:
        Asking: the user has to be asked first; in the newer era only.
        ToolError: the host's reply is none.
    """
    if not can_ask(context):
        return None
    if context.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        try:
            outcome = await context.elicit(question, Consent)
        except ValueError as error:  # accepted, and filled in wrong
            raise ToolError("The reply to the question was not of its form; call again.") from error
        return isinstance(outcome, AcceptedElicitation) and outcome.data.go_ahead
    reply = (context.input_responses or {}).get(KEY)
    if not isinstance(reply, ElicitResult) or context.request_state != about:
        raise Asking(question, about)
    return reply.action == "accept" and (reply.content or {}).get("go_ahead") is True


async def may_fetch(context: Context[Any, Any], model: str, num_bytes: int, free_bytes: int) -> bool:
    """Whether a model may be downloaded now. A host that cannot ask goes on: the server's user has named the model.

    Raises:
        Asking: the user has to be asked first; in the newer era only.
    """
    question = (
        f"Download the model {model} from the Hugging Face hub? It has {gigabytes(num_bytes)}; "
        f"{gigabytes(free_bytes)} are free."
    )
    return await ask(context, question, f"download {model}") is not False


async def may_remove(context: Context[Any, Any], sessions: list[str], confirm: bool) -> bool:
    """Whether sessions may be removed from disk, for good; `confirm` is the call's own word that the user wants it.

    Raises:
        Asking: the user has to be asked first; in the newer era only.
        ToolError: the host cannot ask, and the call does not confirm it.
    """
    if confirm or not sessions:
        return True
    names = ", ".join(sessions[:10]) + (f" and {len(sessions) - 10} more" if len(sessions) > 10 else "")
    consent = await ask(context, f"Remove what is on disk of {names}? There is no way back.", f"remove {sessions}")
    if consent is None:
        raise ToolError(
            f"{names}: persisted, so closing removes what is on disk, for good. Ask your user, and call again with "
            "confirm=true; or have them use `mlx-mcp sessions rm`."
        )
    return consent


def gigabytes(num_bytes: int) -> str:
    """A number of bytes as users read it."""
    return f"{num_bytes / 1e9:.1f} GB"
