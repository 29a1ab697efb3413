"""A hook of MkDocs: links to files outside docs/, which hold in a clone, lead to the repository on the site."""

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Lead every relative link that leaves docs/ to the repository."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def lead(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return link[0] if path.startswith("docs/") else f"]({config.repo_url}/blob/main/{path})"

    return re.sub(r"\]\((\.\.?/[^)\s#]+)\)", lead, markdown)
