"""Whose folder, socket and engine it is, without any engine."""

import os
import shutil
import socket
import tempfile

import pytest

from mlx_mcp.errors import EngineUnavailable, NoSharedEngine
from mlx_mcp.process import place as place_module
from mlx_mcp.process.daemon import open_log
from mlx_mcp.process.locks import take_life_lock, try_lock
from mlx_mcp.process.place import Place


@pytest.fixture
def place():
    """A place that is prepared, in a short folder: a socket's path has a limit."""
    folder = tempfile.mkdtemp(prefix="mlx-")
    place = Place(folder)
    place.prepare()
    yield place
    shutil.rmtree(folder)


def test_a_folder_that_others_may_enter_is_no_place_for_an_engine(place):
    for mode in (0o750, 0o705):
        os.chmod(place.folder, mode)
        with pytest.raises(EngineUnavailable, match=r"Others may enter .*chmod 700 .*, or set MLX_MCP_STATE_DIR"):
            place.prepare()
    os.chmod(place.folder, 0o700)
    place.prepare()


def test_a_link_in_the_folders_place_is_refused(place, tmp_path):
    (tmp_path / "state").symlink_to(place.folder)
    with pytest.raises(EngineUnavailable, match="a symbolic link, not a folder of yours"):
        Place(str(tmp_path / "state")).prepare()


def test_nothing_is_sent_to_what_is_no_socket_of_ours(place):
    assert place.connect() is None
    os.symlink("/dev/null", place.socket)
    with pytest.raises(EngineUnavailable, match="not your engine's socket"):
        place.connect()


def test_nothing_is_said_to_an_engine_that_the_kernel_takes_for_anothers(place, monkeypatch):
    with place.listen():
        place.connect().close()
        monkeypatch.setattr(place_module, "peer", lambda connection: (1, os.geteuid() + 1))
        with pytest.raises(EngineUnavailable, match=r"is another user's\. Set MLX_MCP_STATE_DIR"):
            place.connect()


def test_a_socket_is_its_users_alone_and_takes_a_stale_ones_place(place):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(place.socket)
    with place.listen():
        assert os.stat(place.socket).st_mode & 0o777 == 0o600


def test_where_no_socket_can_be_the_reason_is_told(place):
    with pytest.raises(NoSharedEngine, match=r"there can be no Unix socket at .*No such file"):
        Place(f"{place.folder}/nowhere").listen()


def test_no_engine_lives_beside_another(place):
    with try_lock(place.life_lock) as held:
        assert held
        with pytest.raises(EngineUnavailable, match="Another engine holds"):
            take_life_lock(place, 0.05)


def test_a_link_in_the_logs_place_is_not_followed(place, tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.symlink(tmp_path / "victim", place.log)
    with pytest.raises(NoSharedEngine, match=r"the log .* cannot be written"):
        open_log(place)
    assert (tmp_path / "victim").read_text() == "precious"
