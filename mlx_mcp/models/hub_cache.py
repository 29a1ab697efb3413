"""What the hub's cache holds. Asks no hub, imports no mlx.

Other programs use the same cache, and leave in it whatever they needed: a config, a tokenizer, some of the weights.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

# One of these sets is a vocabulary.
VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("tiktoken.model",),
    ("tekken.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
# What changes prompts or ends answers, where the repository has it.
BESIDE_THE_VOCABULARY = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(model.*-)(\d{5})-of-(\d{5})\.safetensors")


def repo_folder(hub_cache: Path, repo: str) -> Path:
    """Where a repository's files are kept, if they are."""
    return hub_cache / f"models--{repo.replace('/', '--')}"


def snapshots(hub_cache: Path, repo: str) -> list[Path]:
    """The folders of a repository's revisions that have a config: the main branch's first, then the newest."""
    folder = repo_folder(hub_cache, repo)
    main = ""
    with suppress(OSError, ValueError):
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    found = [(path.parent.name == main, path.stat().st_mtime, path.parent) for path in configs(folder)]
    return [path for _, _, path in sorted(found, reverse=True)]


def configs(folder: Path) -> list[Path]:
    """The config files of all revisions; of links those that lead to a file."""
    return [path for path in folder.glob("snapshots/*/config.json") if path.is_file()]


def find_whole(hub_cache: Path, repo: str) -> Path | None:
    """The first of a repository's snapshots that is a whole model; None where none is."""
    return next((path for path in snapshots(hub_cache, repo) if not missing(path)), None)


def find_usable(hub_cache: Path, repo: str) -> Path | None:
    """As `find_whole`, but settings of the tokenizer may be missing. For when the hub cannot be asked for them."""
    return next((path for path in snapshots(hub_cache, repo) if not missing_core(path)), None)


def find_weights(hub_cache: Path, repo: str) -> Path | None:
    """The first of a repository's snapshots that has a config and all weights; None where none has."""
    found = find_whole(hub_cache, repo)
    return found or next((path for path in snapshots(hub_cache, repo) if not missing_weights(path)), None)


def missing(folder: Path) -> list[str]:
    """Which files a snapshot lacks to be a whole model: config, weights by their index, and tokenizer.

    Anything else in the repository, such as a readme or weights in other forms, may be missing.
    """
    listed = listing(folder)
    beside = ("tokenizer_config.json",) if listed is None else (n for n in BESIDE_THE_VOCABULARY if n in listed)
    return [*missing_core(folder), *(name for name in beside if not (folder / name).is_file())]


def missing_core(folder: Path) -> list[str]:
    """Which files a snapshot lacks without which no model can be loaded."""
    lacking = [name for name in ("config.json",) if not (folder / name).is_file()] + missing_weights(folder)
    vocabulary = any(all((folder / name).is_file() for name in names) for names in VOCABULARIES)
    if not vocabulary and not any(folder.glob("*.tiktoken")):
        lacking.append("tokenizer.json")
    return lacking


def missing_weights(folder: Path) -> list[str]:
    """Which of its weights a snapshot lacks."""
    return [name for name in weight_names(folder) if not (folder / name).is_file()]


def weight_names(folder: Path) -> list[str]:
    """The files that a folder's weights consist of, as the index, or else their own names, say; they may be missing."""
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(name for name in names if isinstance(name, str)) or [INDEX]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{INDEX} (which is damaged)"]
    found = sorted(path.name for path in folder.glob("model*.safetensors"))
    shards = [shard for name in found if (shard := _SHARD.fullmatch(name))]
    if shards:  # one of many that was fetched alone, without the index
        first, _, count = shards[0].groups()
        return [f"{first}{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    return found or ["model.safetensors"]


def listing(folder: Path) -> set[str] | None:
    """All files of a snapshot's revision, if the hub's library has left a list of them."""
    # As huggingface_hub.get_cached_repo_tree reads it; to import that takes as long as a server takes to start.
    path = folder.parent.parent / "trees" / f"{folder.name}.json"
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another form
        return None
