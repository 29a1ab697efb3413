"""Files of hosts as they are found: commented, empty, half empty, with tabs, CRLF, a byte order mark, other servers."""

from __future__ import annotations

BOM = b"\xef\xbb\xbf"
OTHERS = """{
  "numStartups": 12,
  "mcpServers": {
    "files": {
      "command": "npx",
      "args": ["-y", "server-files", "/home/me"],
      "env": {"KEY": "secret"}
    }
  },
  "projects": {"/home/me": {"mcpServers": {"mlx": {"command": "other"}}}}
}
"""
ZED = """// Zed settings
//
// For information, see the documentation.
{
  "theme": "One Dark", // dark
  /* what talks to models */
  "context_servers": {
    // the database
    "pg": {
      "command": "pg-mcp",
      "args": [],
    }, // end of pg
    // none after this
  },
  "vim_mode": true,
}
"""
TOML = """# Codex
model = "gpt-5" # the newest
approval_policy = 'on-request'

[mcp_servers.docs] # by me
command = "npx"
args = [
  "-y",
  "docs", # the package
]

[mcp_servers.docs.env]
"A B" = "1"

# about profiles
[profiles.fast]
model = "gpt-5-mini"
"""
YAML = """# Goose
GOOSE_PROVIDER: anthropic   # whose
extensions:
  # what it edits with
  developer: &builtin
    bundled: true
    enabled: true
    name: developer
    timeout: 300
    type: builtin
  memory:
    <<: *builtin
    name: "memory"

GOOSE_MODE: 'smart_approve'
"""

# What it is → the host, and the file's bytes, None where there is none.
ODD_FILES: dict[str, tuple[str, bytes | None]] = {
    "json: missing": ("cursor", None),
    "json: empty": ("cursor", b""),
    "json: only blanks": ("cursor", b"  \n\t\n"),
    "json: only a line ending of Windows": ("cursor", b"\r\n"),
    "json: only a byte order mark": ("cursor", BOM),
    "json: only comments": ("zed", b"// nothing yet\n/* really */"),
    "json: empty object": ("cursor", b"{}"),
    "json: empty object with a final newline": ("cursor", b"{}\n"),
    "json: empty object over two lines": ("cursor", b"{\n}\n"),
    "json: empty object with blanks in it": ("cursor", b"{   }"),
    "json: empty object with a comment in it": ("zed", b"{ /* later */ }\n"),
    "json: empty object with a line comment in it": ("zed", b"{\n  // later\n}\n"),
    "json: no servers, empty": ("cursor", b'{"mcpServers": {}}'),
    "json: no servers, empty, indented": ("claude-desktop", b'{\n  "mcpServers": {}\n}\n'),
    "json: no servers, null byte order": ("windsurf", BOM + b'{\r\n  "mcpServers": {\r\n  }\r\n}'),
    "json: other servers": ("claude-code", OTHERS.encode()),
    "json: other servers, CRLF": ("claude-code", OTHERS.replace("\n", "\r\n").encode()),
    "json: other servers, tabs": ("claude-code", OTHERS.replace("  ", "\t").encode()),
    "json: other servers, four spaces": ("claude-code", OTHERS.replace("  ", "    ").encode()),
    "json: other servers, no final newline": ("claude-code", OTHERS.rstrip().encode()),
    "json: other servers, blank lines at the end": ("claude-code", OTHERS.encode() + b"\n\n  \n"),
    "json: other servers, byte order mark, CRLF": ("claude-code", BOM + OTHERS.replace("\n", "\r\n").encode()),
    "json: other servers, line endings of both kinds": ("claude-code", OTHERS.replace("\n", "\r\n", 3).encode()),
    "json: minified": ("cursor", b'{"a":[1,2.50,-3e2,true,null],"mcpServers":{"x":{"command":"y"}}}'),
    "json: minified, no servers": ("cursor", b'{"a":1,"mcpServers":{}}'),
    "json: minified, other keys": ("gemini", b'{"theme":"dark"}'),
    "json: servers on one line of several": ("cursor", b'{\n  "mcpServers": {"x": {"command": "y"}},\n  "b": 1\n}\n'),
    "json: servers last, brace on the same line": ("cursor", b'{"mcpServers": {\n    "x": {"command": "y"} }}\n'),
    "json: indented as a whole": ("cursor", b'    {\n      "mcpServers": {\n        "x": {}\n      }\n    }\n'),
    "json: unicode, escapes": (
        "cursor",
        '{\n  "näme": "\\u00e9 \\"/\\" é 🙂",\n  "mcpServers": {"é": {}}\n}\n'.encode(),
    ),
    "json: a key twice": ("cursor", b'{\n  "a": 1,\n  "a": 2,\n  "mcpServers": {"x": {}}\n}\n'),
    "json: a server called like ours elsewhere": ("gemini", b'{\n  "mlx": {"mlx": 1},\n  "mcpServers": {"y": {}}\n}\n'),
    "json with comments: zed": ("zed", ZED.encode()),
    "json with comments: zed, CRLF": ("zed", ZED.replace("\n", "\r\n").encode()),
    "json with comments: vscode, inputs": (
        "vscode",
        b'{\n\t"inputs": [\n\t\t{"id": "k"}, // key\n\t],\n'
        b'\t"servers": {\n\t\t"x": {"url": "http://x//y"} // the last\n\t}\n}\n',
    ),
    "json with comments: a comment before the comma": ("vscode", b'{\n  "servers": {\n    "x": {} /* c */,\n  }\n}\n'),
    "json with comments: a comma on a line of its own": (
        "vscode",
        b'{\n  "servers": {\n    "x": {} // c\n    ,\n  }\n}',
    ),
    "json with comments: opencode": ("opencode", b'{\n  "$schema": "s", // {"mcp": {}}\n  /* "mcp": {} */\n}\n'),
    "json with comments: trailing commas on one line": ("vscode", b'{"servers": {"x": {"args": [1, 2,],},},}'),
    "toml: missing": ("codex", None),
    "toml: empty": ("codex", b""),
    "toml: only comments, no final newline": ("codex", b"# nothing\n# yet"),
    "toml: other servers": ("codex", TOML.encode()),
    "toml: other servers, CRLF": ("codex", TOML.replace("\n", "\r\n").encode()),
    "toml: other servers, byte order mark": ("codex", BOM + TOML.encode()),
    "toml: other servers, no final newline": ("codex", TOML.rstrip().encode()),
    "toml: blank lines at the end": ("codex", TOML.encode() + b"\n\n\n"),
    "toml: dotted keys": ("codex", b'mcp_servers.docs.command = "x"\n\n[tui]\ntheme = "d"\n'),
    "toml: headers in texts and lists": (
        "codex",
        b'notes = """\n[mcp_servers.mlx]\ncommand = 1\n"""\nlists = [\n  [1],\n[ "mcp_servers.mlx" ],\n]\n'
        b"[[seen]]\nat = 2026-01-01\n",
    ),
    "yaml: missing": ("goose", None),
    "yaml: empty": ("goose", b""),
    "yaml: only comments": ("goose", b"# nothing\n"),
    "yaml: a document's beginning": ("goose", b"---\n"),
    "yaml: other extensions": ("goose", YAML.encode()),
    "yaml: other extensions, CRLF": ("goose", YAML.replace("\n", "\r\n").encode()),
    "yaml: other extensions, byte order mark": ("goose", BOM + YAML.encode()),
    "yaml: no extensions": ("goose", b"GOOSE_MODEL: x"),
    "yaml: no extensions, begun and ended": ("goose", b"---\nGOOSE_MODEL: x\n...\n"),
    "yaml: extensions null": ("goose", b"extensions:\nGOOSE_MODEL: x\n"),
    "yaml: extensions null, commented": ("goose", b"extensions:  # none yet\n# end\n"),
    "yaml: extensions null by name": ("goose", b"a: 1\nextensions: ~\n"),
    "yaml: extensions empty": ("goose", b"extensions: {}\nb: [1, 2]\n"),
    "yaml: extensions empty, commented": ("goose", b"extensions: {}  # none\n"),
    "yaml: in braces": ("goose", b"{extensions: {a: {cmd: b}}, c: 1}\n"),
    "yaml: extensions in braces": ("goose", b"extensions: {a: {cmd: b}, }\nc: 1\n"),
    "yaml: a text of lines at the end": (
        "goose",
        b"extensions:\n  a:\n    cmd: b\n    description: |\n      one\n\n      two\n\n",
    ),
    "yaml: indented by four, anchored": ("goose", b"extensions:\n    a: &a\n        cmd: b\nother: *a\n"),
}
