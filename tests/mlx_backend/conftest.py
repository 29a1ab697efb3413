"""What several tests of this layer stand on: attention as with OpenBLAS, kernels, tokenizers of several families."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_mcp.mlx_backend.cpu import decode_attention
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from mlx_mcp.models.registry import EMBEDDED_FOLDER
from tests.effort import LONG, THOROUGH
from tests.mlx_backend.layer_rows import in_pieces, use_cpu_attention
from tests.mlx_backend.tokenizers_made import FAMILIES, MISTRAL, QWEN, make_tokenizer


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """MLX has a C++ compiler make every fused kernel, for a second and more; a short run does without."""
    if not (THOROUGH or LONG):
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def cpu_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as where MLX uses OpenBLAS, in many pieces."""
    use_cpu_attention(monkeypatch)
    monkeypatch.setattr(decode_attention, "MAX_SCORES", 1000)
    in_pieces(monkeypatch, 1000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("qwen"), **QWEN)


@pytest.fixture(scope="module")
def embedded() -> ChatTokenizer:
    return ChatTokenizer(EMBEDDED_FOLDER, None)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("mistral"), **MISTRAL)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, embedded: ChatTokenizer) -> dict[str, ChatTokenizer]:
    made = {name: make_tokenizer(tmp_path_factory.mktemp(name), **given) for name, given in FAMILIES.items()}
    return {**made, "embedded": embedded}
