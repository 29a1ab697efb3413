"""`mlx-mcp service`: a server over HTTP that the system starts for its user, at login or at once."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from mlx_mcp.cli.options import Model
from mlx_mcp.cli.reporting import note, reporting_errors

service = typer.Typer(help="A server over HTTP that the system keeps running.", no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be written and run, and do nothing.")]
Port = Annotated[int | None, typer.Option(help="Port; 8080 if not given.", min=1, max=65535)]


def options_of(model: str | None, port: int | None) -> tuple[str, ...]:
    """The options of `serve` that a service is to have."""
    import os

    if model and os.path.isdir(model):
        model = os.path.abspath(model)
    return (*(("--model", model) if model else ()), *(("--port", str(port)) if port else ()))


@service.command("print")
@reporting_errors
def print_file(model: Model = None, port: Port = None) -> None:
    """Print the service's file, for launchd or systemd."""
    from mlx_mcp.install.service import service_file

    typer.echo(service_file(options_of(model, port)).data.decode(), nl=False)


@service.command()
@reporting_errors
def install(model: Model = None, port: Port = None, dry_run: DryRun = False) -> None:
    """Have the system start the server now and at each login, and again if it fails."""
    from mlx_mcp.install.service import service_file

    its = service_file(options_of(model, port))
    typer.echo(f"{'would write' if dry_run else 'writes'} {its.path}")
    if not dry_run:
        its.path.parent.mkdir(parents=True, exist_ok=True)
        if its.path.exists():
            run(its.end, may_fail=True)  # it is replaced
        its.path.write_bytes(its.data)
    run(its.begin, dry_run)


@service.command()
@reporting_errors
def uninstall(dry_run: DryRun = False) -> None:
    """End the server, and have the system start it no more."""
    from mlx_mcp.install.service import service_file

    its = service_file()
    if not its.path.exists():
        note(f"There is no service: nothing is at {its.path}.")
        return
    run(its.end, dry_run, may_fail=True)  # it may not run
    typer.echo(f"{'would remove' if dry_run else 'removes'} {its.path}")
    if not dry_run:
        its.path.unlink()
    run(its.after, dry_run, may_fail=True)


def run(commands: tuple[tuple[str, ...], ...], dry_run: bool = False, may_fail: bool = False) -> None:
    """Run commands of the system, and show each.

    Raises:
        InstallError: one fails, and may not.
    """
    import subprocess

    from mlx_mcp.errors import InstallError

    for command in commands:
        typer.echo(f"{'would run' if dry_run else 'runs'} {shlex.join(command)}")
        if dry_run:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            failed = (done.stderr or done.stdout).strip() if done.returncode else ""
            status = done.returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            failed, status = str(error), 1
        if status and not may_fail:
            raise InstallError(
                f"`{shlex.join(command)}` failed: {failed or f'status {status}'}. The service's file is written: "
                "run this yourself where the user's service manager is at hand, or `mlx-mcp service uninstall`."
            )
