"""Results that are not there yet, and results that are too long for a host."""

from __future__ import annotations

from mcp_types import CallToolResult, ResourceLink, TextContent

from mlx_mcp.api.mcp.results import Part, Running, compact
from mlx_mcp.service.activity import progress_line
from mlx_mcp.service.jobs import Job

RESULT_URI = "mlx://results/{}"


def running(job: Job) -> Running:
    """A job that has not ended."""
    texts = [meter.text for meter in job.meters]
    return Running(
        result_id=job.result_id,
        tool=job.tool,
        progress=progress_line(job.meters),
        text=(texts[0] or None) if len(texts) == 1 else None,
        texts=texts if len(texts) > 1 else None,
    )


def document(result: CallToolResult) -> str:
    """What of a result is read in parts: the text of a single answer, else all of it as JSON."""
    structured = result.structured_content or {}
    text = structured.get("text")
    return text if isinstance(text, str) else compact(structured)


def part(result_id: str, result: CallToolResult, offset: int, limit: int) -> CallToolResult:
    """At most `limit` characters of a result from `offset` on, and a link to the whole of it."""
    text, uri = document(result), RESULT_URI.format(result_id)
    end = min(len(text), offset + limit)
    more = end < len(text)
    made = Part(
        result_id=result_id,
        uri=uri,
        text=text[offset:end],
        next_offset=end if more else None,
        total_chars=len(text),
        note=f"This is a part. get_result with this result_id and offset={end} has the next." if more else None,
    )
    structured = made.model_dump(mode="json", exclude_none=True)
    rest = {key: value for key, value in structured.items() if key != "text"}
    link = ResourceLink(type="resource_link", uri=uri, name=result_id, mime_type="application/json")
    texts = [TextContent(type="text", text=each) for each in (made.text, compact(rest))]
    return CallToolResult(content=[*texts, link], structured_content=structured)
