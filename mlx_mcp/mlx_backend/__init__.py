"""The only importer of mlx and mlx_lm; imported late, since those take seconds."""
