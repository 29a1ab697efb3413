"""`mlx-mcp install` and `uninstall`: the options; what they do is imported when it is asked for."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_mcp.cli.options import Json, Model
from mlx_mcp.cli.reporting import reporting_errors


def host_names(incomplete: str) -> list[str]:
    """The names of hosts that begin so."""
    from mlx_mcp.install.hosts import HOSTS

    return [host.name for host in HOSTS if host.name.startswith(incomplete)]


Hosts = Annotated[
    list[str] | None,
    typer.Argument(metavar="HOST", help="Hosts; without one, all are listed.", autocompletion=host_names),
]
Name = Annotated[str, typer.Option("--name", help="What the host calls the server.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be changed or run, and do nothing.")]
Project = Annotated[bool, typer.Option("--project", help="In the current folder's project, not for all of the user's.")]
Force = Annotated[bool, typer.Option("--force", help="Also where the entry of that name is another program's.")]
EditFile = Annotated[
    bool, typer.Option("--edit-file", help="Edit the host's file, even if the host has a command of its own for it.")
]


@reporting_errors
def install(
    hosts: Hosts = None,
    name: Name = "mlx",
    model: Model = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", help="A setting, as MLX_MCP_KV_BITS=8; repeatable.")
    ] = None,
    http: Annotated[str | None, typer.Option("--http", help="Connect to `serve --http` at this URL.")] = None,
    token_env: Annotated[
        str | None, typer.Option("--token-env", help="The environment variable in which the host finds its token.")
    ] = None,
    token_in_clear: Annotated[
        bool, typer.Option("--token-in-clear", help="Write what that variable holds now into the host's file.")
    ] = False,
    project: Project = False,
    dry_run: DryRun = False,
    show: Annotated[bool, typer.Option("--print", help="Print the entry alone, to paste.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Print a link that has the host register the server.")] = False,
    edit_file: EditFile = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Register this server with hosts, so that they start it or connect to it; without a host, list them."""
    from mlx_mcp.cli import registering

    if not hosts:
        registering.show_hosts(name, project, as_json)
        return
    server = registering.server_of(model, env or [], http, token_env, token_in_clear)
    if show:
        registering.for_each(hosts, lambda host: registering.show_entry(host, name, server))
    elif link:
        registering.for_each(hosts, lambda host: registering.show_link(host, name, server))
    else:
        task = registering.Task.of(name, project, force, dry_run, edit_file)
        registering.for_each(hosts, lambda host: registering.register(host, server, task))


@reporting_errors
def uninstall(
    hosts: Hosts = None,
    name: Name = "mlx",
    project: Project = False,
    dry_run: DryRun = False,
    edit_file: EditFile = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take this server out of hosts, and leave their files as they were before; without a host, list them."""
    from mlx_mcp.cli import registering

    if not hosts:
        registering.show_hosts(name, project, as_json)
        return
    task = registering.Task.of(name, project, force, dry_run, edit_file)
    registering.for_each(hosts, lambda host: registering.take_out(host, task))
