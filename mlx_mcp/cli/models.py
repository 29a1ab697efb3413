"""`mlx-mcp models`, `pull`, `rm` and `alias`: what can be served, downloaded and removed, and under which names."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mcp.cli.completion import model_names
from mlx_mcp.cli.options import Json, Model
from mlx_mcp.cli.output import Column, show_json, show_table
from mlx_mcp.cli.reporting import NOTHING, note, reporting_errors
from mlx_mcp.errors import EngineUnavailable, InvalidRequest, ModelError, UnknownModel

if TYPE_CHECKING:
    from mlx_mcp.core.ports import ModelSpec
    from mlx_mcp.models.registry import Entry, Registry
    from mlx_mcp.stats import EngineStats

SPARE_DISK_BYTES = 1 << 30  # what a download leaves free

Name = Annotated[str, typer.Argument(help="A hub id such as owner/name, or an alias.", autocompletion=model_names)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@reporting_errors
def models(model: Model = None, as_json: Json = False) -> None:
    """List the models that can be served, what they take, and which are in the engine's memory."""
    from mlx_mcp.config import Config
    from mlx_mcp.wiring import registry_of

    config = Config.load(model=model)
    entries, stats = registry_of(config).entries(), stats_of(config)
    if as_json:
        show_json([told(entry, stats) for entry in entries])
        return
    show_table(MODELS, [row(told(entry, stats)) for entry in entries])


@reporting_errors
def pull(name: Name, yes: Yes = False) -> None:
    """Download a model, or what is missing of it; one that was cut off goes on where it ended."""
    from mlx_mcp.cli.progress import bytes_bar
    from mlx_mcp.config import Config
    from mlx_mcp.models.hub import fetch, free_bytes, plan

    config = Config.load()
    repo = on_hub(name)
    planned = plan(repo)
    if planned.whole:
        typer.echo(f"{repo} is here, {mb(planned.total_bytes)}: {planned.whole}")
        return
    free = free_bytes()
    typer.echo(
        f"{repo}: {planned.num_files} files, {mb(planned.total_bytes)}, of which {mb(planned.here_bytes)} are here; "
        f"{mb(free)} of the disk are free."
    )
    if planned.lacking_bytes + SPARE_DISK_BYTES > free:
        raise ModelError(
            f"The disk has not room for {mb(planned.lacking_bytes)} more. Remove a model (`mlx-mcp models`, `mlx-mcp "
            "rm`), or set HF_HOME to a folder on another disk."
        )
    confirm(f"Download {mb(planned.lacking_bytes)}?", yes)
    with bytes_bar(f"fetching {repo}") as show:
        folder = fetch(repo, lambda p: show(p.done_bytes, p.total_bytes or 0), stall_s=config.fetch_stall_s)
    typer.echo(f"{repo} is here: {folder}")


@reporting_errors
def rm(name: Name, yes: Yes = False) -> None:
    """Remove a downloaded model from the hub cache, where other programs may use it too."""
    from mlx_mcp.models.hub import remove, size_of

    repo = on_hub(name)
    state = engine_status()
    used = [each for each in (*state["models"], *state["loading"]) if each.partition("+")[0] == repo] if state else []
    if used:
        raise InvalidRequest(
            f"The engine has {used[0]} in memory. Unload it (the tool unload_model), or end the engine: "
            "`mlx-mcp engine stop`."
        )
    size = size_of(repo)
    if size is None:
        note(f"Nothing of {repo} is in the hub cache; `mlx-mcp models` lists what is.")
        raise typer.Exit(NOTHING)
    typer.echo(f"{repo}: {mb(size)}; other programs that use the hub cache lose it too.")
    confirm(f"Remove {repo}?", yes)
    typer.echo(f"{mb(remove(repo))} are free again.")


@reporting_errors
def alias(
    short: Annotated[str | None, typer.Argument(metavar="ALIAS", help="The further name.")] = None,
    model: Annotated[
        str | None, typer.Argument(help="What it stands for, as --model would take it.", autocompletion=model_names)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Have it stand for nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Give a model a further name, in config.toml; without arguments, list those there are."""
    from mlx_mcp.cli.config_file import set_alias
    from mlx_mcp.config import Config, config_path
    from mlx_mcp.models.settings import ModelSettings, Settings, check_aliases
    from mlx_mcp.wiring import registry_of

    registry = registry_of(Config.load())
    if short is None:
        if as_json:
            show_json(registry.aliases)
        else:
            show_table(ALIASES, [[each, name] for each, name in sorted(registry.aliases.items())])
        return
    if remove:
        if model is not None:
            raise InvalidRequest("Give --remove, or a model that the alias stands for; not both.")
        if not set_alias(config_path(), short, None):
            note(f"{short!r} is no alias; `mlx-mcp alias` lists those there are.")
            raise typer.Exit(NOTHING)
        typer.echo(f"{short} stands for nothing any more.")
        return
    if model is None:
        raise InvalidRequest(f"Give the model that {short!r} is to stand for, or --remove.")
    spec = find(registry, model)
    taken = [entry.spec.name for entry in registry.entries()]
    check_aliases(Settings({spec.name: ModelSettings(aliases=(short,))}), taken)
    set_alias(config_path(), short, key_of(spec))
    typer.echo(f"{short} stands for {spec.name} from the next start of a window on ({config_path()}).")


# What these share


def told(entry: Entry, stats: EngineStats) -> dict[str, Any]:
    """What is told of a model."""
    from mlx_mcp.service.models import model_of

    model = model_of(entry, stats)
    return {
        "name": entry.spec.name,
        "default": entry.default,
        "aliases": list(entry.aliases),
        "weights_bytes": model.weights_bytes,
        "kv_bytes_per_1k_tokens": model.kv_bytes_per_1k,
        "context_tokens": entry.context_tokens,
        "loaded": model.loaded,
        "pinned": bool(entry.spec.options.pinned),
        "fits": model.fits.value,
        "tools": entry.tools,
        "thinks": entry.thinks,
        "sampling": entry.sampling,
        "about": entry.spec.summary,
    }


def row(model: dict[str, Any]) -> list[str]:
    """A line of the table."""
    size = "not downloaded" if model["weights_bytes"] is None else f"{model['weights_bytes'] / 1e6:,.1f} MB"
    marks = [word for word in ("default", "loaded", "pinned") if model[word]]
    can = [word for word, has in (("tools", model["tools"]), ("thoughts", model["thinks"])) if has]
    name = f"{model['name']} ({', '.join(marks)})" if marks else model["name"]
    fits = "" if model["weights_bytes"] is None else model["fits"]
    also, context = ", ".join(model["aliases"]), f"{model['context_tokens'] or '?'}"
    return [name, also, size, fits, context, ", ".join(can), model["about"]]


def stats_of(config: Any) -> EngineStats:
    """What the engine process has in memory, and what there is room for."""
    from mlx_mcp.stats import EngineStats, ModelStats
    from mlx_mcp.wiring import memory_budget

    state = engine_status()
    if state is None:
        return EngineStats(max_weights_bytes=memory_budget(config).max_weights_bytes)
    of_models = {name: ModelStats(**each) for name, each in state["of_models"].items()}
    return EngineStats(
        models=tuple(of_models),
        of_models=of_models,
        weights_bytes=state["weights_bytes"],
        max_weights_bytes=state["max_weights_bytes"],
    )


def engine_status() -> dict[str, Any] | None:
    """What the engine process says of itself; None if there is none, or it is of another version, or says nothing."""
    from mlx_mcp.process.daemon import ask
    from mlx_mcp.process.place import user_place

    try:
        state: Any = ask(user_place(), "status")
    except EngineUnavailable as error:
        note(str(error))
        return None
    return state if state and "max_weights_bytes" in state else None


def on_hub(name: str) -> str:
    """The hub id of a model by its name or alias.

    Raises:
        InvalidRequest: it is not on the hub.
    """
    from mlx_mcp.config import Config
    from mlx_mcp.wiring import registry_of

    spec = find(registry_of(Config.load()), name)
    if spec.source != "hub":
        raise InvalidRequest(f"{spec.name} is not from the hub but in {spec.location}. Give a hub id, owner/name.")
    return spec.location


def find(registry: Registry, name: str) -> ModelSpec:
    """A model by its name or alias, or as --model would take it."""
    from mlx_mcp.models.settings import named

    try:
        return registry.resolve(name)
    except UnknownModel:
        if "/" not in name:
            raise
        return named(name)


def key_of(spec: ModelSpec) -> str:
    """How the settings name a model, whatever --model is."""
    base = "embedded" if spec.source == "embedded" else spec.location
    return f"{base}+{spec.options.adapter}" if spec.options.adapter else base


def confirm(question: str, yes: bool) -> None:
    """Ask, unless the user said not to.

    Raises:
        InvalidRequest: there is nobody to ask.
        typer.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} There is nobody to ask here: say --yes.")
    typer.confirm(question, abort=True, err=True)


def mb(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10_000_000_000 else f"{num_bytes / 1e6:,.1f} MB"


MODELS = (
    Column("name", whole=True),
    Column("also", rank=1),
    Column("weights", rank=2),
    Column("fits", rank=4),
    Column("context", rank=3),
    Column("can", rank=5),
    Column("about", rank=6),
)
ALIASES = (Column("alias", whole=True), Column("model", whole=True))
