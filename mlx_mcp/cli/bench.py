"""`mlx-mcp bench`: what this machine reaches with a model, beside mlx_lm; a table, JSON, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlx_mcp.cli.completion import model_names
from mlx_mcp.cli.options import OpenBlas
from mlx_mcp.cli.output import Column, show_table
from mlx_mcp.cli.reporting import note, reporting_errors, say
from mlx_mcp.errors import InvalidRequest

COLUMNS = (
    Column("WHAT", whole=True),
    Column("", whole=True),
    Column("MLX-MCP", whole=True),
    Column("MLX_LM", whole=True),
    Column("RATIO", whole=True),
    Column("NOTE", rank=1),
)


@reporting_errors
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="`embedded`, a folder, or a hub id; the default model.", autocompletion=model_names),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file as JSON.", dir_okay=False)
    ] = None,
    picture_file: Annotated[
        Path | None, typer.Option("--picture", help="Write a picture of them to this SVG file.", dir_okay=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Look only briefly; the figures are rough.")] = False,
    openblas: OpenBlas = None,
) -> None:
    """Measure this machine with a model, beside mlx_lm in the same run; about two minutes. Nothing is sent anywhere."""
    for file in (json_file, picture_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise InvalidRequest(f"There is no folder {str(file.parent)!r} to write {file.name} to. Make it first.")
    from mlx_mcp.bench.effort import QUICK, Effort
    from mlx_mcp.bench.measure import measure, new_report
    from mlx_mcp.bench.picture import picture
    from mlx_mcp.config import Config

    config = Config.load(model=model, openblas=openblas)
    report = new_report()
    try:
        for _ in measure(config, QUICK if quick else Effort(), report, lambda what: say(f"{what} …")):
            pass
    finally:  # Ctrl-C leaves what was measured until then
        if report.figures:
            typer.echo(report.title)
            show_table(COLUMNS, report.rows())
            if json_file is not None:
                write(json_file, json.dumps(report.as_json(), indent=2) + "\n")
            if picture_file is not None:
                write(picture_file, picture(report))
            if not report.complete:
                note("not everything was measured; what was is above.")
    written = [str(file) for file in (json_file, picture_file) if file is not None]
    attach = " and ".join(written) if written else "what --json FILE and --picture FILE write"
    note(
        f"nothing was sent anywhere. To report figures, attach {attach} to an issue at "
        "https://github.com/mlx-mcp/mlx-mcp/issues."
    )


def write(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        InvalidRequest: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"The measured figures cannot be written to {str(file)!r}: {error.strerror}. Give another file."
        ) from error
