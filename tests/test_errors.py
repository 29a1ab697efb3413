"""Every error that leaves the package names a next step, and a test reaches it. See `error_texts` for how."""

import re

VERBS = (
    "accept address ask begin call change check choose close connect convert correct create describe download edit end "
    "export fix free generate give go have import install kill leave let lift look lower make mount move name persist "
    "put raise read register remove rename restart retry run save say send serve set shorten show split start stop "
    "take try unload unset use wait write"
)
# An order, at the beginning of a sentence or of a part of one: "Lower max_tokens to 7 or less, or shorten the prompt."
ORDER = re.compile(rf"(?:^|[.:;,(?!\0]\s*|\b(?:or|and|then)\s+)(?:{VERBS.replace(' ', '|')})\b", re.IGNORECASE)
# Something to use, with what it does: "`mlx-mcp engine stop` ends it", "list_models shows them".
TO_USE = re.compile(
    r"`mlx-mcp [a-z ]+[^`]*` |\b(?:list_\w+|get_result|persist_session) \w+s\b|\b\w+/list has\b|\bMLX_MCP_[A-Z_]+ lists"
)
# What an argument, a setting or a part of a message has to be: "count is 65; it must be from 1 to 64."
MUST_BE = re.compile(r"\bmust (?:be|have)\b|\bmay have\b")


def names_a_step(text):
    """Whether a text says what to do now: an order, a command or tool to use, or what a value has to be."""
    return any(each.search(text) for each in (ORDER, TO_USE, MUST_BE))
