"""The server's icon, which its tools, prompts and resources have too."""

from __future__ import annotations

from base64 import b64encode

from mcp_types import Icon

# Three branches that go on from one root.
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path d="M3 12h18M9 12c5 0 4-7 9-7M9 12c5 0 4 7 9 7" '
    'fill="none" stroke="#d97706" stroke-width="2"/></svg>'
)
ICONS = [Icon(src=f"data:image/svg+xml;base64,{b64encode(SVG.encode()).decode()}", mime_type="image/svg+xml")]
