"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_mcp.cli.completion import model_names

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="`embedded`, a folder, or a hub id. The embedded model if nothing is set.",
        autocompletion=model_names,
    ),
]
OpenBlas = Annotated[
    bool | None,
    typer.Option("--openblas/--no-openblas", help="Use an installed OpenBLAS on Linux CPUs (default: yes)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
