"""The `llm` command, with the server in its file of OpenAI-compatible models."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from chat_story import ASKED, BADGE, KEY, MODEL, PROMPT, main

TOOL = f'def lookup(key: str) -> str:\n    "Find what is on file."\n    return {{"{KEY}": "{BADGE}"}}[key]\n'


async def chat(address: str, token: str) -> list[str]:
    """Run the command as in a terminal."""
    return await asyncio.to_thread(told, address, token)


def told(address: str, token: str) -> list[str]:
    """What the command prints; with `--td` it tells of the calls beside it."""
    model = {"model_id": MODEL, "model_name": MODEL, "api_base": address, "supports_tools": True, "api_key_name": "mlx"}
    with TemporaryDirectory() as folder:
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
        Path(folder, "keys.json").write_text(json.dumps({"mlx": token}))
        command = [Path(sys.executable).with_name("llm"), "-m", MODEL, "--functions", TOOL, "--td", PROMPT]
        env = os.environ | {"LLM_USER_PATH": folder}
        ran = subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    assert KEY in ran.stderr, ran.stderr
    ASKED.append(KEY)
    return list(ran.stdout)  # a pipe does not keep the pieces apart


if __name__ == "__main__":
    main("llm", chat)
