"""What putting the layers together does beside that."""

import subprocess
import sys

PROGRAM = """
import gc
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.wiring import LateLoader
LateLoader(Config()).prepare(Registry(None).resolve(None), lambda line: None)
frozen = gc.get_freeze_count()
LateLoader(Config()).prepare(Registry(None).resolve(None), lambda line: None)
print(frozen, len(gc.get_objects()), gc.get_freeze_count() - frozen)
"""


def test_what_is_imported_for_models_is_never_looked_through_for_garbage_again():
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    frozen, others, later = map(int, subprocess.run([sys.executable, "-c", PROGRAM], **options).stdout.split())
    assert frozen > 10 * others
    assert later <= 0  # no model is ever frozen: it may go again
