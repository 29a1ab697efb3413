"""Helpers that a program finds beside Python, and what tells its variables."""


def chunks(text, size, overlap=0):
    """Cut a text or a list into parts of `size`, each of which repeats the last `overlap` of the one before."""
    if size < 1 or not 0 <= overlap < size:
        raise ValueError("chunks(text, size, overlap=0) needs a size of 1 or more, and a smaller overlap")
    found = []
    start = 0
    while start == 0 or start + overlap < len(text):
        found.append(text[start : start + size])
        start += size - overlap
    return found


def grep(pattern, text, ignore_case=False):
    """The lines in which the regular expression is found: (line number, line), counted from 1."""
    import re

    found = re.compile(pattern, re.IGNORECASE) if ignore_case else re.compile(pattern)
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if found.search(line)]


def lines(text, first=1, last=None):
    """The lines of a text from `first` to `last`, counted from 1, both included."""
    return text.splitlines()[first - 1 : last]


def _preview(value):
    if isinstance(value, str):
        shown = repr(value[:60])
        return f"str, {len(value)} characters: {shown}" + ("…" if len(value) > 60 else "")
    if isinstance(value, (bool, int, float)) or value is None:
        return f"{type(value).__name__}: {value}" if not isinstance(value, int) or abs(value) < 10**30 else "int, large"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        kinds = []
        for each in value:
            if len(kinds) == 3:
                break
            kinds.append(_brief(each) + (": " + _brief(value[each]) if isinstance(value, dict) else ""))
        shown = ", ".join(kinds) + (", …" if len(value) > 3 else "")
        return f"{type(value).__name__}, {len(value)} items: {shown}"
    return type(value).__name__


def _brief(value):
    if isinstance(value, str):
        return repr(value[:30]) + ("…" if len(value) > 30 else "")
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (bool, float)) or value is None or (isinstance(value, int) and abs(value) < 10**30):
        return str(value)
    return type(value).__name__


def _described(found, helpers):
    shown = {}
    for name, value in found.items():
        kind = type(value).__name__
        helper = name in helpers and kind in ("function", "type")
        if not name.startswith("_") and kind != "module" and not helper:
            shown[name] = _preview(value)
    return shown


def _show_vars(found, helpers):
    return "\n".join([f"{name}: {line}" for name, line in _described(found, helpers).items()])
