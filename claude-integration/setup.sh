#!/usr/bin/env bash
# Sets Claude Code up for the local model: registers the server and adds routing rules to ~/.claude/CLAUDE.md.
#
#   setup.sh [--plugin] [--uninstall] [options of `mlx-mcp install`, as --model NAME]
#
# Run again it changes nothing. Before a file is changed for the first time, it is copied to ~/.local/state/mlx-mcp/before/.
# --plugin installs the plugin, with its commands, sub-agent and skill, in place of the bare server. --uninstall takes everything
# back; the copies stay.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
claude_folder=${CLAUDE_CONFIG_DIR:-$HOME/.claude}
servers=${CLAUDE_CONFIG_DIR:-$HOME}/.claude.json
rules=$claude_folder/CLAUDE.md
copies=${MLX_MCP_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/mlx-mcp}/before

plugin=no uninstall=no options=()
while (($#)); do
    case $1 in
        --plugin) plugin=yes ;;
        --uninstall) uninstall=yes ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        *) options+=("$1") ;;
    esac
    shift
done

stop() { # stop MESSAGE: end with what to do
    echo "setup.sh: $1" >&2
    exit 2
}

keep() { # keep FILE: copy it once, as it was before anything of ours was in it
    (umask 077 && mkdir -p "$copies") # the engine starts in no folder that others may enter
    local copy
    copy=$copies/$(basename "$1")
    if [[ -e $1 && ! -e $copy ]] && ! grep -q mlx-mcp "$1"; then cp -p "$1" "$copy"; fi
}

# What is between the marks in the rules, or nothing of it. Whether the file was there, and ended with a newline, is in the first mark.
merge() { # merge FRAGMENT_FILE: put it in; merge: take it out
    python3 - "$rules" "$@" <<'PYTHON'
import os, re, sys
path, end = os.path.realpath(sys.argv[1]), "<!-- mlx-mcp: end -->\n"
old = open(path, newline="").read() if os.path.exists(path) else None
found = re.search(r"<!-- mlx-mcp: begin(, (?:new file|no newline))? -->\n.*?" + re.escape(end), old or "", re.S)
if found:
    how = found[1] or ""
    head = old[: found.start()]
    before = (head[:-1] if "newline" in how and head.endswith("\n") else head) + old[found.end() :]
    before = None if "file" in how and not before else before
else:
    before = old
new = before
if len(sys.argv) > 2:
    how = ", new file" if before is None else ", no newline" if before and not before.endswith("\n") else ""
    gap = "\n" if how == ", no newline" else ""
    new = (before or "") + gap + f"<!-- mlx-mcp: begin{how} -->\n" + open(sys.argv[2]).read() + end
if new == old:
    sys.exit()
if new is None:
    os.remove(path)
    sys.exit()
os.makedirs(os.path.dirname(path), exist_ok=True)
temporary = path + ".mlx-mcp"
with open(temporary, "w", newline="") as file:
    file.write(new)
    os.fsync(file.fileno())
if old is not None:
    os.chmod(temporary, os.stat(path).st_mode & 0o777)
os.replace(temporary, path)
PYTHON
}

if [[ $uninstall == yes ]]; then
    if command -v claude >/dev/null; then
        claude plugin uninstall mlx@mlx-mcp >/dev/null 2>&1 || true
        claude plugin marketplace remove mlx-mcp >/dev/null 2>&1 || true
    fi
    if command -v mlx-mcp >/dev/null; then mlx-mcp uninstall claude-code; fi
    merge
    echo "Taken back. What was there before is in $copies."
    exit
fi

if ! command -v mlx-mcp >/dev/null; then
    command -v uv >/dev/null || stop "install mlx-mcp first: 'uv tool install $(dirname "$here")', or 'pip install' in an environment on PATH."
    uv tool install "$(dirname "$here")"
    command -v mlx-mcp >/dev/null || stop "mlx-mcp is installed, but not on PATH: run 'uv tool update-shell', open a new terminal, and run this again."
fi

keep "$servers"
keep "$rules"
if [[ $plugin == yes ]]; then
    command -v claude >/dev/null || stop "there is no 'claude' on PATH, which installs plugins. Leave out --plugin."
    ((${#options[@]} == 0)) || stop "the plugin takes no options; set MLX_MCP_MODEL in your environment, or leave out --plugin."
    claude plugin marketplace add "$(dirname "$here")"
    claude plugin install mlx@mlx-mcp
    mlx-mcp uninstall claude-code # the plugin brings its own
else
    mlx-mcp install claude-code ${options[@]+"${options[@]}"}
fi
merge "$here/CLAUDE.md"
echo "The routing rules are in $rules."
