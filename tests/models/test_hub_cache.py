"""What a cache holds that other programs use too, and what is fetched of the rest."""

import json
import shutil
import threading

import pytest
from huggingface_hub import constants

from mlx_mcp.core.ports import LoadProgress
from mlx_mcp.errors import Abandoned, ModelError
from mlx_mcp.models import hub as hub_module
from mlx_mcp.models.hub import fetch, plan, remove
from mlx_mcp.models.hub_cache import find_whole, missing
from tests.models.fake_hub import COMMIT, serving
from tests.models_made import make_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def hub(origin, cache, monkeypatch):
    monkeypatch.setattr(hub_module, "RETRY_S", 0.01)
    with serving(origin) as server:
        use(server.url, monkeypatch)
        yield server


def use(url, monkeypatch):
    """As HF_ENDPOINT does for a process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache, origin, names=None, revision=COMMIT, listed=None, main=True):
    """A snapshot with these files, or all, as the hub's library leaves it; `listed` is its list of all there are."""
    repo = cache / "models--someone--tiny"
    folder = repo / "snapshots" / revision
    folder.mkdir(parents=True)
    for path in origin.iterdir():
        if names is None or path.name in names:
            shutil.copy(path, folder)
    if main:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(revision)
    if listed is not None:
        (repo / "trees").mkdir()
        (repo / "trees" / f"{revision}.json").write_text(json.dumps({"files": {name: {} for name in listed}}))
    return folder


def get(seen=None, **options):
    """Fetch, with what was reported in `seen`."""
    return fetch("someone/tiny", (seen if seen is not None else []).append, **options)


def size(hub):
    return (hub.folder / WEIGHTS).stat().st_size


# What is whole


def test_a_whole_model_is_used_without_asking_the_hub(hub, cache, origin):
    assert get() == get() == cache / "models--someone--tiny" / "snapshots" / COMMIT
    hub.asked.clear()
    shutil.rmtree(cache)
    folder = cached(cache, origin)
    assert get() == folder
    assert hub.asked == []


def test_a_file_that_nobody_needs_may_be_missing(cache, origin):
    names = [path.name for path in origin.iterdir()]
    folder = cached(cache, origin, listed=[*names, "notes.txt", "README.md", "pytorch_model.bin", "onnx/model.onnx"])
    assert get() == folder


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ({WEIGHTS}, WEIGHTS),
        ({"tokenizer.json"}, "tokenizer.json"),
        ({"tokenizer_config.json"}, "tokenizer_config.json"),
        ({WEIGHTS, "tokenizer.json", "tokenizer_config.json"}, WEIGHTS),
    ],
)
def test_what_is_lacking_is_named(cache, origin, lost, named):
    names = {path.name for path in origin.iterdir()}
    assert named in missing(cached(cache, origin, names - lost))
    assert find_whole(cache, "someone/tiny") is None


def test_what_the_repository_has_of_the_tokenizer_belongs_to_the_model(cache, origin):
    names = [path.name for path in origin.iterdir()]
    folder = cached(cache, origin, listed=[*names, "chat_template.jinja", "generation_config.json"])
    assert missing(folder) == ["chat_template.jinja", "generation_config.json"]
    (folder / "chat_template.jinja").write_text("")
    (folder / "generation_config.json").write_text("{}")
    assert missing(folder) == []


def test_all_weights_of_the_index_are_needed(cache, origin):
    folder = cached(cache, origin)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / WEIGHTS).rename(folder / shards[0])
    assert missing(folder) == [shards[1]]  # its name says that there are two
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert missing(folder) == [shards[1]]
    (folder / shards[1]).write_bytes(b"")
    assert missing(folder) == []
    (folder / "model.safetensors.index.json").write_text("{")
    assert "damaged" in missing(folder)[0]


def test_a_link_to_a_blob_that_is_gone_is_no_file(cache, origin):
    folder = cached(cache, origin)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/gone")
    assert missing(folder) == [WEIGHTS]


def test_a_whole_older_revision_serves_where_a_newer_one_is_not_whole(cache, origin):
    older = cached(cache, origin, revision="a" * 40)
    cached(cache, origin, ["config.json"], revision="b" * 40)
    assert get() == older


def test_offline_a_model_serves_that_lacks_settings_of_its_tokenizer_only(cache, origin):
    names = {path.name for path in origin.iterdir()} - {"tokenizer_config.json"}
    folder = cached(cache, origin, names)
    assert get() == folder


# What is not


@pytest.mark.parametrize("left", [[], ["config.json"], ["config.json", "tokenizer.json"], [WEIGHTS]])
def test_what_other_programs_left_does_not_stop_the_download(hub, cache, origin, left):
    if left:
        cached(cache, origin, left, listed=[path.name for path in origin.iterdir()])
    folder = get()
    assert missing(folder) == []
    assert (folder / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()


@pytest.mark.parametrize("left", [[], ["config.json", "tokenizer.json"]])
def test_offline_what_is_missing_is_named_with_the_next_step(cache, origin, left):
    if left:
        cached(cache, origin, left)
    with pytest.raises(
        ModelError, match=f"{'is not whole in the local hub cache' if left else 'not in'}.*Unset that, or give the path"
    ):
        get()


def test_a_caller_can_have_nothing_downloaded(hub, cache, origin):
    cached(cache, origin, ["config.json", WEIGHTS])
    with pytest.raises(
        ModelError, match=r"callers can have nothing downloaded. Have the server started with `--model someone/tiny`"
    ):
        get(may_fetch=False)
    assert hub.asked == []


def test_an_unreachable_hub_is_said_and_what_is_missing(cache, origin, monkeypatch):
    use("http://127.0.0.1:9", monkeypatch)
    cached(cache, origin, ["config.json"])
    with pytest.raises(ModelError, match=r"model\.safetensors.*could not be downloaded.*network"):
        get()


def test_offline_a_pull_says_what_to_unset(cache, origin):
    cached(cache, origin, ["config.json"])
    with pytest.raises(ModelError, match=r"and HF_HUB_OFFLINE forbids to fetch it\. Unset that\."):
        plan("someone/tiny")


def test_a_model_that_cannot_be_removed_is_told_with_what_to_do(cache, origin, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    cached(cache, origin, ["config.json"])
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(ModelError, match=r"could not be removed: .*Permission denied.*\. Remove its folder yourself"):
        remove("someone/tiny")


def test_a_name_that_the_hub_cannot_have_is_refused():
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        fetch("not//an:id", print)


def test_the_bytes_that_are_here_are_told_up_to_the_last(hub, origin):
    seen = []
    get(seen)
    told = [progress for progress in seen if progress.doing == "fetching"]
    assert [p.done_bytes for p in told] == sorted(p.done_bytes for p in told)
    assert {p.total_bytes for p in told} == {sum(path.stat().st_size for path in origin.iterdir())}
    assert told[-1].done_bytes == told[-1].total_bytes > told[0].done_bytes


def test_a_connection_that_is_cut_goes_on_where_it_was(hub, origin):
    hub.cut = size(hub) // 3
    folder = get()
    assert hub.begun == [0, hub.cut, 2 * hub.cut, 3 * hub.cut][: len(hub.begun)]
    assert len(hub.begun) >= 3
    assert (folder / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()


def test_a_hub_without_ranges_is_asked_from_the_beginning(hub, origin, cache):
    hub.ranges = False
    stop = stopping_at(hub, 2)
    with pytest.raises(Abandoned):
        fetch("someone/tiny", stop)
    assert (get() / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()
    assert set(hub.begun) == {0}


def stopping_at(hub, parts):
    """Reports of a download that nobody waits for once a part of the weights has come; the hub holds the rest back."""
    hub.cut, hub.stall = size(hub) // parts, True
    small = sum(path.stat().st_size for path in hub.folder.iterdir()) - size(hub)

    def report(progress):
        if progress.done_bytes >= small + hub.cut:
            hub.cut, hub.stall = None, False
            raise Abandoned

    return report


def test_an_abandoned_download_is_gone_on_with(hub, origin, cache):
    with pytest.raises(Abandoned):
        fetch("someone/tiny", stopping_at(hub, 2))
    hub.go_on.set()
    assert (get() / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()
    assert hub.begun[1] >= size(hub) // 2
    assert not list(cache.glob("**/*.incomplete"))


def test_a_hub_that_sends_nothing_more_is_given_up_and_gone_on_with_later(hub, origin):
    hub.cut, hub.stall = size(hub) // 2, True
    with pytest.raises(ModelError, match=r"next to nothing.*MB are here: call again"):
        get(stall_s=0.3)
    hub.cut, hub.stall = None, False
    assert (get() / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()
    assert hub.begun[-1] >= size(hub) // 2


def test_what_did_not_come_as_the_hub_has_it_is_never_used(hub, origin):
    hub.damage = True
    with pytest.raises(ModelError, match="Call again"):
        get()
    hub.damage = False
    assert (get() / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()


def test_two_that_fetch_the_same_model_fetch_it_once(hub, origin):
    gate, folders = threading.Barrier(2), []

    def report(progress):
        if progress == first:
            gate.wait(30)

    first = LoadProgress("asking the hub")
    both = [threading.Thread(target=lambda: folders.append(fetch("someone/tiny", report))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert len(set(folders)) == 1
    assert len(folders) == 2
    assert hub.begun == [0]
