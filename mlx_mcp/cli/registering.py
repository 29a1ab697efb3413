"""What `mlx-mcp install` and `uninstall` do: for each host by its own command, or else in its file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import typer

from mlx_mcp.cli.output import Column, show_json, show_table
from mlx_mcp.cli.reporting import FAILED, note
from mlx_mcp.errors import InstallError, InvalidRequest
from mlx_mcp.install import host_command
from mlx_mcp.install.hosts import HOSTS, Host, hosts_named
from mlx_mcp.install.links import link_of
from mlx_mcp.install.record import Record
from mlx_mcp.install.registration import Change, Registration, whole_entry
from mlx_mcp.install.server import Remote, Server, server_here
from mlx_mcp.install.texts import same
from mlx_mcp.process.place import user_place

COLUMNS = (
    Column("host", whole=True),
    Column("found", rank=1),
    Column("registered", whole=True),
    Column("file", rank=2),
)


@dataclass(frozen=True)
class Task:
    """What is asked for beside the host."""

    name: str
    project: Path | None
    force: bool
    dry_run: bool
    edit_file: bool

    @classmethod
    def of(cls, name: str, project: bool, force: bool, dry_run: bool, edit_file: bool) -> Self:
        """The task that options stand for; a project is the current folder."""
        return cls(name, Path.cwd() if project else None, force, dry_run, edit_file)

    def registration(self, host: Host) -> Registration:
        """The server's entry in a host's file."""
        return Registration(host, self.name, Record(Path(user_place().folder)), self.project)

    def program(self, host: Host) -> str | None:
        """The host's own command, if it is there and may be used."""
        return None if self.edit_file else host_command.program_of(host)


def for_each(names: list[str], work: Callable[[Host], None]) -> None:
    """Do it for every host, also after one has failed; then exit as failed."""
    failed = False
    for host in hosts_named(names):
        try:
            work(host)
        except InstallError as error:
            note(str(error))
            failed = True
    if failed:
        raise typer.Exit(FAILED)


def server_of(
    model: str | None, env: list[str], url: str | None, token_variable: str | None, in_clear: bool
) -> Server | Remote:
    """The server that is meant.

    Raises:
        InvalidRequest: options do not go together, or one has not its form.
        InstallError: this server cannot be started from elsewhere.
    """
    if url is None:
        if token_variable or in_clear:
            raise InvalidRequest("--token-env and --token-in-clear go with --http: give its URL, or leave them out.")
        pairs = [each.partition("=") for each in env]
        for name, equals, value in pairs:
            if not name or not equals:
                raise InvalidRequest(
                    f"--env is {name + equals + value!r}; it must be NAME=VALUE, as MLX_MCP_KV_BITS=8."
                )
        return server_here(model, {name: value for name, _, value in pairs})
    if model or env:
        raise InvalidRequest(
            "--model and --env belong to `mlx-mcp serve --http`: leave them out where --http has a URL."
        )
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"--http is {url[:80]!r}; it must be a URL, as http://127.0.0.1:8080/mcp.")
    if not in_clear:
        return Remote(url, token_variable or "")
    token = os.environ.get(token_variable or "", "")
    if not token_variable or not token:
        raise InvalidRequest(
            "--token-in-clear copies a token: give --token-env, the name of a variable that holds it now."
        )
    return Remote(url, token_variable, token)


def show_entry(host: Host, name: str, server: Server | Remote) -> None:
    """Print the entry alone."""
    typer.echo(whole_entry(host, name, host.entry(name, server)), nl=False)


def show_link(host: Host, name: str, server: Server | Remote) -> None:
    """Print the link that registers the server."""
    typer.echo(link_of(host, name, server))


def register(host: Host, server: Server | Remote, task: Task) -> None:
    """Put the entry in by the host's own command, or else into its file."""
    entry, registration = host.entry(task.name, server), task.registration(host)
    change = registration.install(entry, task.force)
    if change.before == change.after:
        typer.echo(f"{host.title}: {task.name} is registered already, in {registration.file}.")
        return
    program = task.program(host)
    words = host_command.adding(host, task.name, entry, server, task.project is not None) if program else []
    if not program or not words:
        do(host, registration, change, task, f"{task.name} is registered, in {registration.file}.")
        return
    steps = [[program, *words]]
    first = host_command.removing(host, task.name, task.project is not None)
    if registration.current() is not None and first:
        steps.insert(0, [program, *first])  # some refuse to register a second one of that name
    if carry_out(host, steps, task):
        registration.keep_in_mind(entry)
        there = same(registration.current(), entry)
        late = "" if there else f"; {registration.file} does not show it yet"
        typer.echo(f"{host.title}: {task.name} is registered, by `{host.program}`{late}.")
        hint(host, found=True)


def take_out(host: Host, task: Task) -> None:
    """Take the entry out as it was put in: by an edit of the file that is known, or else by the host's own command."""
    registration = task.registration(host)
    change = registration.uninstall(task.force)
    if change.before == change.after:
        if not task.dry_run:
            registration.apply(change)
        typer.echo(f"{host.title}: {task.name} is not registered in {registration.file}.")
        return
    program = task.program(host)
    words = host_command.removing(host, task.name, task.project is not None)
    if program and words and not change.exact:
        if carry_out(host, [[program, *words]], task):
            registration.keep_in_mind(None)
            typer.echo(f"{host.title}: {task.name} was taken out, by `{host.program}`.")
        return
    do(host, registration, change, task, f"{task.name} was taken out of {registration.file}.")


def do(host: Host, registration: Registration, change: Change, task: Task, done: str) -> None:
    """Change the file and say so; or show the change, if that is all that is asked for."""
    if task.dry_run:
        typer.echo(change.diff(), nl=False)
        return
    found = host.found()
    registration.apply(change)
    typer.echo(f"{host.title}: {done}")
    if change.edit:
        hint(host, found)


def carry_out(host: Host, steps: list[list[str]], task: Task) -> bool:
    """Run the host's commands; or show them and return False, if that is all that is asked for."""
    for step in steps:
        if task.dry_run:
            typer.echo(shlex.join(step))
        else:
            host_command.run(step, task.project)
    return not task.dry_run


def hint(host: Host, found: bool) -> None:
    """Say what is left to do, where the host was found on this machine or not."""
    if found:
        note(f"Start {host.title} anew, if it is open.")
    else:
        note(f"{host.title} was not found on this machine; it will see the entry once it is there.")


def show_hosts(name: str, in_project: bool, as_json: bool) -> None:
    """List all hosts: whether they are here, and whether this server is registered with them."""
    project = Path.cwd() if in_project else None
    record, rows = Record(Path(user_place().folder)), list[dict[str, Any]]()
    for host in HOSTS:
        if project is not None and not host.project:
            continue
        registration = Registration(host, name, record, project)
        try:
            entry = registration.current()
            state = "no" if entry is None else "yes" if registration.is_own(entry) else "another's"
        except InstallError as error:
            state = f"? {error}"
        rows.append({"host": host.name, "found": host.found(), "registered": state, "file": str(registration.file)})
    if as_json:
        show_json(rows)
        return
    show_table(
        COLUMNS,
        [
            [row["host"], "yes" if row["found"] else "", row["registered"].partition(" ")[0], row["file"]]
            for row in rows
        ],
    )
