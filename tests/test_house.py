"""The shape of the house: who may import whom, what is exported, that everything is documented."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import mlx_mcp
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.cli.main import app
from mlx_mcp.config import Config
from mlx_mcp.models.registry import EMBEDDED_FOLDER, Registry
from mlx_mcp.service.service import Service
from tests.fakes import fake_client

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_mcp"

# Layer, a folder or a file → the project's own layers, and the outside packages, that it may import beside the standard
# library. What stands for a folder stands for all below it that has no line of its own.
LAYERS = {
    "errors": ((), ()),
    "stats": ((), ()),
    "config": (("errors",), ("pydantic", "pydantic_settings", "platformdirs")),
    "chat": (("errors",), ()),
    "core": (("chat", "errors", "stats"), ()),
    "engine": (("chat", "core", "errors", "stats"), ()),
    "mlx_backend": (
        ("chat", "core", "errors"),
        ("mlx", "mlx_lm", "llguidance", "numpy", "jinja2", "threadpoolctl", "tokenizers"),
    ),
    "models": (("chat", "core", "errors"), ("huggingface_hub",)),
    "storage": (("core", "errors"), ()),
    "process": (("errors", "__init__"), ()),
    "install": (("errors",), ("yaml",)),
    "service": (
        (
            "chat",
            "core/origin",
            "core/sampling",
            "core/session",
            "engine/client",
            "engine/messages",
            "engine/requests",
            "models",
            "errors",
            "stats",
        ),
        ("anyio",),
    ),
    # Traces are no protocol of a face: every face's requests have spans.
    "service/tracing": (("service",), ("opentelemetry",)),
    "workflows": (
        ("service", "core/durable_sandbox", "core/session", "core/session_names", "chat", "errors", "stats"),
        ("anyio",),
    ),
    "workflows/reason_over": (
        ("workflows", "service", "core/session", "chat", "errors"),
        ("anyio", "jsonschema"),
    ),
    # The inside of the sandbox: an interpreter and what surrounds it. It knows nothing of the service.
    "workflows/sandbox/runtime": ((), ()),
    "workflows/sandbox/values": ((), ()),
    "workflows/sandbox/places": ((), ()),
    "workflows/sandbox/trials": ((), ()),
    "workflows/sandbox/inside": ((), ()),
    "workflows/sandbox/prelude": ((), ()),
    "workflows/sandbox/explaining": (("workflows/sandbox/runtime",), ()),
    "workflows/sandbox/classes": (("workflows/sandbox/runtime",), ()),
    "workflows/sandbox/rewriting": (("workflows/sandbox",), ()),
    "workflows/sandbox/idioms": (("workflows/sandbox",), ()),
    "workflows/sandbox/isolation": (("errors",), ()),
    "workflows/sandbox/frames": ((), ()),
    "workflows/sandbox/dumps": (("errors",), ()),
    "workflows/sandbox/cpython": (("workflows/sandbox", "errors", "__init__"), ()),
    "workflows/sandbox/cpython_process": (("workflows/sandbox", "errors"), ()),
    "workflows/sandbox/cpython_worker": (("workflows/sandbox", "errors"), ()),
    # It runs in a process of its own, which sees the standard library and cloudpickle.
    "workflows/sandbox/child": (
        tuple(f"workflows/sandbox/{name}" for name in ("frames", "inside", "journal", "values")),
        ("cloudpickle",),
    ),
    "workflows/sandbox/monty": (("workflows/sandbox", "errors"), ("pydantic_monty",)),
    "workflows/sandbox/monty_process": (("workflows/sandbox", "errors"), ("pydantic_monty",)),
    "workflows/sandbox/monty_worker": (("workflows/sandbox", "errors"), ("pydantic_monty",)),
    "api": ((), ()),
    "api/mcp": (
        ("api/web", "service", "workflows", "chat", "errors", "__init__"),
        ("mcp", "mcp_types", "pydantic", "anyio"),
    ),
    "api/anthropic": (("service", "chat", "errors", "api/web"), ("pydantic", "starlette")),
    "api/openai": (("api/web", "service", "chat", "errors"), ("pydantic", "starlette")),
    "api/sessions": (
        ("api/web", "service", "chat", "errors"),
        ("pydantic", "starlette"),
    ),
    "api/web": (("service", "chat", "errors"), ("pydantic", "starlette", "anyio")),
    "api/http": (("service", "config"), ("mcp", "mcp_types", "pydantic", "starlette", "uvicorn", "h11", "jwt")),
    "api/http/metrics": (("service",), ("starlette", "prometheus_client")),
    "hosting": (
        (
            "api",
            "service",
            "workflows",
            "core/durable",
            "core/durable_sandbox",
            "core/ports",
            "engine/client",
            "engine/messages",
            "models/registry",
            "process",
            "storage/token_file",
            "wiring",
            "config",
            "errors",
            "__init__",
        ),
        ("mcp", "mcp_types", "pydantic", "anyio", "starlette", "uvicorn"),
    ),
    "api/page": (("service",), ("starlette",)),
    "hosting/logs": (("config", "errors", "service/observing"), ("structlog",)),
    "hosting/traces": (("config", "__init__"), ("opentelemetry",)),
    "wiring": (("config", "core", "engine", "errors", "mlx_backend", "models", "stats", "storage"), ()),
    "bench": (
        ("chat", "config", "core", "engine", "errors", "mlx_backend", "models", "wiring", "__init__"),
        ("mlx", "mlx_lm"),
    ),
    "doctor": (
        (
            *("chat", "config", "core", "engine", "errors", "mlx_backend", "models", "process", "wiring", "__init__"),
            *("service", "workflows"),
        ),
        ("mlx",),
    ),
    "cli": (None, ("typer", "rich", "anyio", "tomlkit")),
    "cli/sessions": (("cli", "config", "core", "errors", "storage"), ("typer", "rich")),
    "__main__": (("cli", "errors", "process"), ()),
    "__init__": ((), ()),
}


def layer_of(inside):
    """The line of the table that holds for a path inside the package, which has no suffix."""
    return next(line for line in (str(inside), *map(str, inside.parents)) if line in LAYERS)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_the_table_allows(path):
    layer = layer_of(path.relative_to(PACKAGE).with_suffix(""))
    own, outside = LAYERS[layer]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "mlx_mcp":
            imported = "/".join(rest) or "__init__"
            allowed = own is None or any(imported == may or imported.startswith(f"{may}/") for may in (*own, layer))
            assert allowed, f"{layer} must not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in outside, f"{layer} must not import {name}"


def test_every_line_of_the_table_is_a_layer():
    assert {layer_of(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")} == set(LAYERS)


def test_a_face_imports_no_other_and_nothing_below_the_service_imports_what_is_above_it():
    above = {"api", "hosting", "cli", "wiring", "doctor", "bench"}
    common = "api/web"  # of all faces, and none itself
    below = {"chat", "core", "engine", "mlx_backend", "models", "storage", "process", "service"}
    for layer, (own, outside) in LAYERS.items():
        reached = {may.partition("/")[0] for may in own or () if may != common}
        if layer.startswith("api"):
            assert not reached & above, layer
        if layer.partition("/")[0] in below:
            assert not reached & above, layer
            assert not {"mcp", "mcp_types", "pydantic", "starlette"} & set(outside), layer
    for layer in ("chat", "storage", "process", "core", "engine"):
        assert LAYERS[layer][1] == (), layer


def test_nothing_heavy_is_imported_before_the_first_generation():
    code = (
        "import sys; from mlx_mcp.config import Config; from mlx_mcp.wiring import wire; "
        "from mlx_mcp.api.mcp.server import build_server; from mlx_mcp.service.service import Service; "
        "build_server(Service(*wire(Config.load()))); "
        "print([m for m in ('mlx_lm', 'transformers', 'numpy', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_package_exports_its_version():
    assert mlx_mcp.__all__ == ["__version__"]


def test_the_embedded_model_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= 4_000_000


def options(command):
    """The options of a command and of those below it that are not hidden."""
    if command.hidden:
        return
    for parameter in command.params:
        yield from (flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("--"))
    for below in getattr(command, "commands", {}).values():
        yield from options(below)


def test_every_tool_argument_command_and_setting_is_in_the_readme_or_the_guide():
    docs = (ROOT / "README.md").read_text() + (ROOT / "docs" / "guide.md").read_text()
    words = [tool.name for tool in make_tools(Service(fake_client(), Registry(None)))]
    words += [
        argument
        for tool in make_tools(Service(fake_client(), Registry(None)))
        for argument in tool.parameters["properties"]
    ]
    words += [f"mlx-mcp {command.callback.__name__}" for command in app.registered_commands]
    words += options(get_command(app))
    for group in app.registered_groups:
        commands = [c for c in group.typer_instance.registered_commands if not c.hidden]
        name = group.name
        words += [f"mlx-mcp {name} {c.name or c.callback.__name__}" for c in commands]
    words += [name if name == "model" else f"MLX_MCP_{name.upper()}" for name in Config.model_fields]
    missing = [
        word for word in words if not re.search(rf"`[^`\n]*{re.escape(word)}[^`\n]*`|```[^`]*{re.escape(word)}", docs)
    ]
    assert missing == []


def test_the_picture_of_the_house_names_every_file():
    structure = (ROOT / "docs" / "structure.md").read_text()
    files = [p.name for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    assert [name for name in files if name not in structure] == []
