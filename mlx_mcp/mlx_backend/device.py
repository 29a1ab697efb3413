"""Says what the device needs: which arithmetic computes attention, and how memory is kept and copied.

The arithmetic for CPUs is in `cpu/`; other modules use it only where a function here says so. They call `on_cpu` by
this module's name, so that a test can have all of them take the ways of a GPU. Engine thread only.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_mcp.core.prefill import CPU_PREFILL, GPU_PREFILL, Prefill
from mlx_mcp.core.slots import CPU_SLABS, GPU_SLABS, SlabSizes
from mlx_mcp.mlx_backend import softmax
from mlx_mcp.mlx_backend.cpu.decode_attention import exp2_attention, folded_attention
from mlx_mcp.mlx_backend.cpu.exp2 import BASE_2
from mlx_mcp.mlx_backend.cpu.openblas import uses_openblas
from mlx_mcp.mlx_backend.softmax import Softmax

SPARE_BYTES = 256 << 20  # freed memory that MLX, or the C library, may keep while nothing runs, for the rows to come
MIN_SCORES = 10_000  # attention of no more scores takes too little time for the arithmetic in `cpu/` to pay
FUSED_HEAD_DIMS = (64, 80, 128)  # of Metal's kernels for chunks: attention of other heads goes by way of all scores
MAX_SCORES = 1 << 26  # of a chunk at once: 128 MB in half precision, and hundreds of queries of most models


def on_cpu() -> bool:
    """Whether MLX computes on a CPU, so that numpy can read and write the memory of arrays."""
    return bool(mx.default_device() == mx.cpu)


def slab_sizes() -> SlabSizes:
    """How rows are laid out in slots; see SlabSizes."""
    return CPU_SLABS if on_cpu() else GPU_SLABS


def prefill() -> Prefill:
    """How the device likes prompts to be read."""
    return CPU_PREFILL if on_cpu() else GPU_PREFILL


def uses_cpu_attention(num_scores: int, dtype: mx.Dtype) -> bool:
    """Whether attention of so many scores is computed by polynomials and numpy, which are fast on x86 CPUs.

    Only where MLX uses OpenBLAS, which rounds differently in batches of each size anyway: on the BLAS of MLX's wheel a
    row stays bitwise what it is alone.
    """
    return num_scores > MIN_SCORES and dtype == mx.float32 and on_cpu() and uses_openblas()


def keeps_scores(head_dim: int, quantized: bool) -> bool:
    """Whether the scores of a chunk's attention lie in memory, rather than within a kernel.

    `quantized` are keys and values, for which mlx_lm has no kernel. A CPU has none at all, but its chunks are short.
    """
    return quantized or head_dim not in FUSED_HEAD_DIMS


def softmax_for(num_scores: int, dtype: mx.Dtype) -> Softmax:
    """The softmax for so many scores."""
    return BASE_2 if uses_cpu_attention(num_scores, dtype) else softmax.MLX


def decode_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of one query per row over its keys and values.

    queries: [rows, heads, 1, head_dim]; keys, values: [rows, kv_heads, tokens, width]; mask: bool, broadcast over
    [rows, kv_heads, heads per kv_head, tokens]; result: [rows, heads, 1, width].
    """
    rows, heads = queries.shape[:2]
    if uses_cpu_attention(rows * heads * keys.shape[2], queries.dtype):
        return exp2_attention(queries, keys, values, scale, mask, sinks)
    if sinks is None and on_cpu():
        return folded_attention(queries, keys, values, scale, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
