"""`python -m mlx_mcp` is `mlx-mcp`."""

from mlx_mcp.cli import main

main()
