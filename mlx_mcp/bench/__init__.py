"""`mlx-mcp bench`: what a machine reaches with a model, beside mlx_lm in the same run."""
