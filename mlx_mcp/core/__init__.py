"""Pure decisions: standard library only, no threads, no MLX."""
