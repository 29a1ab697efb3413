"""Programs of ours that work through the input of a sandbox, for models that cannot write their own.

Each finds `_question`, `_schema` and `_chunk_chars`, and submits {"value": the answer, "unread": parts that no model
could read, "parts": all parts}.
"""

from __future__ import annotations

from mlx_mcp.workflows.reason_over.question import Strategy

# The input as (name, text), whatever variables it lies in; its parts; and the answer out of what was found in these.
COMMON = r"""
def _texts():
    found = []
    try:
        found = [(name, text) for name, text in files.items()]
    except NameError:
        pass
    if not found:
        try:
            found = [("", context)]
        except NameError:
            pass
    if not found:
        raise ValueError("There is neither `files` nor `context` to work through: give files, or strategy free.")
    return found

def _parts_of(name, text):
    head = f"From {name}:\n" if name else ""
    made, start = [], 0
    while start < len(text):
        end = min(len(text), start + _chunk_chars)
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                at = text.rfind(mark, start + _chunk_chars // 2, end)
                if at > 0:
                    end = at + len(mark)
                    break
        made.append(head + text[start:end])
        start = end
    return made

def _answer(notes, unread, parts):
    kept = "\n\n".join(notes)[:_chunk_chars] or "(nothing that bears on the question)"
    about = "Found in a long input, part by part:\n\n" + kept
    value = llm_query("Answer this out of what was found: " + _question, text=about, schema=_schema)
    submit({"value": value, "unread": unread, "parts": parts})

def _object(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties],
        "additionalProperties": False,
    }
"""
SIZE = COMMON + "submit(sum(len(text) for name, text in _texts()))\n"
MAP_REDUCE = (
    COMMON
    + r"""
_parts = [part for name, text in _texts() for part in _parts_of(name, text)]
if len(_parts) == 1:
    submit({"value": llm_query(_question, text=_parts[0], schema=_schema), "unread": 0, "parts": 1})
_ask = (
    f"Question: {_question}\nBelow is one part of a long input. Note all in it that bears on the question, with names, "
    "numbers and dates as they stand there; relevant is false where nothing does."
)
_form = _object(relevant={"type": "boolean"}, notes={"type": "string", "maxLength": 800})
_notes, _left = [], _parts
for _round in range(4):
    if not _left:
        break
    try:
        _found = llm_map(_ask, _left, schema=_form)
    except (ValueError, RuntimeError) as error:
        if "run again with a larger" in str(error):
            raise  # the budget is used up
        _found = [None for part in _left]
    _notes = _notes + [each["notes"] for each in _found if each and each["relevant"] and each["notes"].strip()]
    _left = [part for part, each in zip(_left, _found) if each is None]
    if _round < 3:
        _left = [half for part in _left for half in (part[:len(part) // 2], part[len(part) // 2:])]
_shorten = "Put these notes together in fewer words. Keep every fact that bears on this: " + _question
while sum(len(note) for note in _notes) > _chunk_chars and len(_notes) > 1:
    _groups = []
    for _note in _notes:
        if _groups and len(_groups[-1]) + len(_note) < _chunk_chars:
            _groups[-1] = _groups[-1] + "\n" + _note
        else:
            _groups.append(_note)
    _shorter = [note for note in llm_map(_shorten, _groups, max_tokens=300) if note]
    if sum(len(note) for note in _shorter) >= sum(len(note) for note in _notes):
        break
    _notes = _shorter
_answer(_notes, len(_left), len(_parts))
"""
)
SEARCH = (
    "import re\n"
    + COMMON
    + r"""
_ask = (
    f"Question: {_question}\nWhich words or short names would a text have that answers it? Give those that are rare "
    "elsewhere."
)
_listed = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1, "maxItems": 12}
_words = [word.lower() for word in llm_query(_ask, schema=_object(words=_listed))["words"] if word.strip()]
_words = set(_words + [word.lower() for word in re.findall(r"[A-Z][A-Za-z0-9_-]+|[0-9]{2,}", _question)])
_scored = []
for _name, _text in _texts():
    _lines = _text.split("\n")
    for _at in range(0, len(_lines), 10):
        _window = "\n".join(_lines[max(0, _at - 2):_at + 12])
        _low = _window.lower()
        _score = sum(1 for word in _words if word in _low)
        if _score:
            _scored.append((_score, -len(_scored), _name, _window))
_scored.sort(reverse=True)
_notes, _room = [], _chunk_chars
for _score, _order, _name, _window in _scored:
    if len(_window) > _room:
        break
    _notes.append((f"From {_name}:\n" if _name else "") + _window)
    _room = _room - len(_window)
_answer(_notes, 0, len(_notes))
"""
)
PROGRAMS = {Strategy.MAP_REDUCE: MAP_REDUCE, Strategy.SEARCH: SEARCH}
