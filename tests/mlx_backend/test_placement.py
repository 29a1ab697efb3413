"""Where rows of a batch are."""

from mlx_mcp.mlx_backend.placement import place
from mlx_mcp.mlx_backend.slabs import num_shared
from tests.mlx_backend.layer_rows import ROWS


def test_positions_count_the_prefix():
    placement = place([(slot, num_shared(prefix) + n, prefix) for slot, prefix, n in ROWS[:4]])
    assert placement.offsets.tolist() == [76, 76, 73, 90]
    assert [run.positions.tolist() for run in placement.runs] == [[[6], [6]], [[40]], [[90]]]
