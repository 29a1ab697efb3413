"""`python -m mlx_mcp` is `mlx-mcp`: the relay if that is all that is asked for, else the command line.

A relay must be up in a blink and stay small, so nothing else is imported before that is known.
"""

import sys

from mlx_mcp.errors import MlxMcpError, NoSharedEngine


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["serve"]:
        relay(sys.argv[2:])
    try:
        from mlx_mcp.cli.main import main as command_line

        command_line()
    except KeyboardInterrupt:  # before there was a command
        sys.exit(130)


def relay(arguments: list[str]) -> None:
    """Relay and exit, if these arguments of `serve` ask for that and there can be an engine process here."""
    from mlx_mcp.process.relay import serve, serve_options, tell

    given = serve_options(arguments)
    if given is None:
        return
    try:
        serve(given.get("model"), {"0": False, "1": True}.get(given.get("openblas", "")))
    except NoSharedEngine as error:
        tell(f"No engine can be shared here, since {error}; serving in this process alone, as with --standalone.")
        sys.argv[2:] = ["--standalone", *arguments]
        return
    except MlxMcpError as error:
        tell(str(error))
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
