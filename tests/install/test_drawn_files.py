"""Files that are drawn, in all three languages: an entry put in changes nothing else, and can be taken back exactly."""

import json
import random

import pytest

from mlx_mcp.install import json_text, toml_text, yaml_text
from mlx_mcp.install.record import Edit, difference
from mlx_mcp.install.texts import BrokenText, rest_of, same, value_at, with_value
from tests.effort import drawn

ENTRY = {"command": "/x/mlx-mcp", "args": ["serve", "{", "// no", "# no"], "env": {"A": 'b"é\\'}}
GAPS = ["", "", " ", "\n", "\n  ", "\t", "// c\n", "/* , } */", '// "x": {\n  ', "\r\n  "]


def json_object(draw, depth, keys=("mcpServers", "a", "b c", "é", 'x"y', "mlx2", "{", "//")):
    def gap():
        return draw.choice(GAPS)

    def value(depth):
        kind = draw.random() if depth > 0 else 0
        if kind < 0.4:
            return draw.choice(["1", "-2.5e3", "true", "null", '"s"', '"// no"', '"\\u00e9\\"}"', '""'])
        if kind < 0.6:
            return "[" + ",".join(gap() + value(depth - 1) + gap() for _ in range(draw.randrange(3))) + gap() + "]"
        return json_object(draw, depth - 1)

    members = []
    for key in draw.sample(keys, draw.randrange(4)):
        shown = json_object(draw, depth - 1) if key == "mcpServers" else value(depth)
        members.append(gap() + json.dumps(key) + gap() + ":" + gap() + shown + gap())
    return "{" + ",".join(members) + (draw.choice(["", ","]) if members else "") + gap() + "}"


def json_file(draw):
    return draw.choice(GAPS) + json_object(draw, 3) + draw.choice(GAPS)


def toml_file(draw):
    text = draw.choice(["", 'k = "v" # c\n'])
    tables = ["mcp_servers", "mcp_servers.a", "mcp_servers.a.env", "mcp_servers.'b c'", "x.y", "mcp_servers.mlx2", "x"]
    for table in draw.sample(tables, draw.randrange(5)):
        text += draw.choice(["", "# about it\n"]) + draw.choice(["[%s]", "[ %s ] # c"]) % table + "\n"
        text += draw.choice(["", "p = 1\n", 'p = """\n[mcp_servers.mlx]\n"""\n', "p = [\n [1],\n]\n", "p = {q = 1}\n"])
        text += draw.choice(["", "\n"])
    return ended(draw, text)


def yaml_file(draw):
    def mapping(depth, indent):
        text = ""
        for key in draw.sample(["extensions", "a", "b c", "é", "m"], draw.randrange(1, 4)):
            blanks = " " * indent
            simple = ["1", "'s'", '"t"', "", "~", "{}", "[]", "{p: {q: 1}}", f"|\n{blanks}  x\n\n{blanks}  y"]
            value = draw.choice(["", "{}", "{p: {q: 1}}"] if key == "extensions" else simple)
            text += draw.choice(["", f"{blanks}# c\n"])
            if depth and draw.random() < 0.4:
                text += f"{blanks}{key}:{draw.choice(['', ' # c', f' &q{draw.random()}'])}\n"
                text += mapping(depth - 1, indent + draw.choice([2, 4]))
            else:
                text += f"{blanks}{key}: {value}{'' if value.startswith('|') else draw.choice(['', ' # c'])}\n"
            text += draw.choice(["", "", "\n"])
        return text

    return ended(draw, draw.choice(["", "", "---\n", "# h\n"]) + mapping(2, 0) + draw.choice(["", "# end\n", "...\n"]))


def ended(draw, text):
    """The text, perhaps with line endings of Windows, perhaps without the last one."""
    text = text.replace("\n", draw.choice(["\n", "\n", "\r\n"]))
    return draw.choice([text, text, text.rstrip()])


@pytest.mark.parametrize(
    ("language", "make", "holder", "count"),
    [
        (json_text, json_file, "mcpServers", 5000),
        (toml_text, toml_file, "mcp_servers", 1500),
        (yaml_text, yaml_file, "extensions", 500),
    ],
    ids=["json", "toml", "yaml"],
)
def test_an_entry_changes_nothing_else_in_a_drawn_file_and_is_taken_back_exactly(language, make, holder, count):
    path, seen = [holder, "mlx"], 0
    for seed in range(drawn(count)):
        text = make(random.Random(seed))
        try:
            data = language.load(text)
        except BrokenText:  # such as a table that was defined by another one before
            continue
        after = language.with_entry(text, path, ENTRY)
        assert same(value_at(language.load(after), path), ENTRY), text
        assert same(rest_of(language.load(after), path), rest_of(data, path)), text
        assert Edit("", "", *difference(text, after)).undone(after) == text
        gone = language.without_entry(after, path)
        assert value_at(language.load(gone), path) is None, text
        assert same(rest_of(language.load(gone), path), rest_of(data, path)), text
        between = language.without_entry(language.with_entry(after, [holder, "other"], {"q": [1]}), path)
        assert same(language.load(between), with_value(language.load(gone), [holder, "other"], {"q": [1]})), text
        seen += 1
    assert seen > drawn(count) / 2
