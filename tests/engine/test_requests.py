import pytest

from mlx_mcp.chat.message import Image, Message, Text
from mlx_mcp.engine.requests import GenerateRequest, check
from mlx_mcp.errors import InvalidRequest


def test_an_image_is_refused_before_any_model_is_loaded():
    seen = Message("user", (Text("What is this?"), Image(b"\x89PNG", "image/png")))
    alone = Message("user", seen.content[1:])
    for request in (
        GenerateRequest((seen,)),
        GenerateRequest((alone,)),
        GenerateRequest((seen, Message("user", "hi")), context=True),
    ):
        with pytest.raises(InvalidRequest, match="cannot see: leave images out"):
            check(request)
