"""What MLX keeps for each thread. Does not import mlx, so that any thread may ask before it is there."""

import sys


def clear_streams() -> None:
    """Destroy the calling thread's MLX streams; to be the last that a thread does which may have touched MLX.

    MLX destroys them itself when the thread ends. If the process exits just then, both do it at once, and the process
    aborts: 8 of 24 exits did that after a thread had imported mlx_lm, and none did when it had called this.
    """
    mlx = sys.modules.get("mlx.core")
    if mlx is not None and hasattr(mlx, "clear_streams"):  # it lacks that while another thread imports it
        mlx.clear_streams()
