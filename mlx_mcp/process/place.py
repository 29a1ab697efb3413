"""Where a user's engine is: its folder, socket, locks and log. Also tells who is at the other end of a socket.

Knows nothing of MCP. Imported by the relay: standard library only, and little of that.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
import zlib
from contextlib import suppress

from mlx_mcp.errors import EngineUnavailable, NoSharedEngine

MAX_SOCKET_BYTES = 100  # the kernel takes 108 on Linux, 104 on macOS and BSD
CONNECT_S = 5.0


class Place:
    """The files of one engine. Each state folder has one engine."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        self.log = os.path.join(self.folder, "engine.log")
        self.start_lock = os.path.join(self.folder, "start.lock")  # held by the process that starts an engine
        self.life_lock = os.path.join(self.folder, "engine.lock")  # held by the engine as long as it lives
        self.socket_folder = self.folder
        if len(os.fsencode(os.path.join(self.folder, "engine.sock"))) > MAX_SOCKET_BYTES:
            name = f"mlx-mcp-{os.getuid()}-{zlib.crc32(os.fsencode(self.folder)):08x}"
            self.socket_folder = os.path.join("/tmp", name)  # make_private_folder checks whose it is
        self.socket = os.path.join(self.socket_folder, "engine.sock")

    def prepare(self) -> None:
        """Make the folders that are missing.

        Raises:
            NoSharedEngine: they cannot be made.
            EngineUnavailable: something else is in their place, or others may enter.
        """
        for folder in dict.fromkeys((self.folder, self.socket_folder)):
            make_private_folder(folder)

    def connect(self) -> socket.socket | None:
        """Connect to the engine; returns None if there is no engine, or it does not listen yet.

        Raises:
            EngineUnavailable: in the socket's place is something else, or the engine of another user.
        """
        if not is_own_socket(self.socket):
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_S)
        try:
            connection.connect(self.socket)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, TimeoutError):  # gone, stale, or crowded
            connection.close()
            return None
        try:
            uid = peer(connection)[1]
        except OSError:  # it has gone meanwhile, and some systems do not know any more who it was
            connection.close()
            return None
        if uid != os.geteuid():
            connection.close()
            raise EngineUnavailable(f"The engine at {self.socket} is another user's. Set MLX_MCP_STATE_DIR.")
        return connection

    def listener_pid(self) -> int | None:
        """The id of the process that listens at the socket, 0 if the system does not say it; None if there is none."""
        connection = self.connect()
        if connection is None:
            return None
        with connection:
            try:
                return peer(connection)[0]
            except OSError:  # it has gone meanwhile
                return 0

    def listen(self) -> socket.socket:
        """Open the engine's socket, in place of a stale one. Only the holder of the life lock may call this.

        Raises:
            EngineUnavailable: something else is in its place.
            NoSharedEngine: there can be no Unix socket here.
        """
        if is_own_socket(self.socket):
            os.unlink(self.socket)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self.socket)
            os.chmod(self.socket, 0o600)
            listener.listen(1024)
        except OSError as error:
            listener.close()
            raise NoSharedEngine(f"there can be no Unix socket at {self.socket} ({error.strerror})") from error
        listener.setblocking(False)
        return listener


def user_place() -> Place:
    """The place of this user's engine: in MLX_MCP_STATE_DIR, or else in the user's state folder.

    Raises:
        NoSharedEngine: the system has no Unix sockets.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise NoSharedEngine("the system has no Unix sockets")
    return Place(state_folder())


def state_folder() -> str:
    """The folder for the state of this user's processes: MLX_MCP_STATE_DIR, or one in the user's state folder."""
    given = os.environ.get("MLX_MCP_STATE_DIR")
    return os.path.abspath(given or os.path.join(user_folder("XDG_STATE_HOME", ".local/state"), "mlx-mcp"))


def sandbox_folder() -> str:
    """The folder with what starts the interpreters of sandboxes, made if it is missing; nobody else may enter.

    Raises:
        NoSharedEngine: it cannot be made.
        EngineUnavailable: something else is in its place, or others may enter.
    """
    folder = os.path.join(state_folder(), "sandbox")
    for each in (state_folder(), folder):
        make_private_folder(each)
    return folder


def trials_file() -> str:
    """The file that says which models can write programs. Its folder need not be there."""
    return os.path.join(state_folder(), "writes-programs.json")


def user_folder(variable: str, below_home: str) -> str:
    """One of the user's folders for settings or state, as platformdirs chooses them."""
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Application Support")
    given = os.environ.get(variable, "")
    return given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), below_home)


def project_folder() -> str | None:
    """The host's project: CLAUDE_PROJECT_DIR, or else the folder in which the host started this process."""
    try:
        return os.path.abspath(os.environ.get("CLAUDE_PROJECT_DIR") or os.getcwd())
    except OSError:  # the folder is gone
        return None


def make_private_folder(path: str) -> None:
    """Make a folder that nobody else may enter, or check that it is one.

    Raises:
        NoSharedEngine: it cannot be made.
        EngineUnavailable: something else is in its place, or others may enter.
    """
    try:
        with suppress(FileExistsError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path, 0o700)
        info = os.lstat(path)
    except OSError as error:
        raise NoSharedEngine(f"the folder {path} cannot be made ({error.strerror})") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise EngineUnavailable(
            f"{path} is {describe_file(info)}, not a folder of yours: no engine is run there. Look at it and take it "
            "away, or set MLX_MCP_STATE_DIR to another folder."
        )
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise EngineUnavailable(
            f"Others may enter {path}, so no engine is run there. `chmod 700 {path}`, or set MLX_MCP_STATE_DIR to a "
            "folder of its own."
        )


def is_own_socket(path: str) -> bool:
    """Whether there is a socket of this user; False if there is nothing.

    Raises:
        EngineUnavailable: something else is in its place.
    """
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid():
        raise EngineUnavailable(
            f"{path} is {describe_file(info)}, not your engine's socket: nothing is sent there. Look at it and take it "
            "away, or set MLX_MCP_STATE_DIR to another folder."
        )
    return True


def describe_file(info: os.stat_result) -> str:
    """The kind of a file, in words, and its owner if that is another user."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
        stat.S_IFSOCK: "a socket",
    }
    kind = kinds.get(stat.S_IFMT(info.st_mode), "something else")
    return kind if info.st_uid == os.geteuid() else f"{kind} of user {info.st_uid}"


def peer(connection: socket.socket) -> tuple[int, int]:
    """The ids of the process and the user at the other end, from the kernel. The process is 0 if it is not known."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid
    # macOS and BSD: LOCAL_PEERCRED gives a struct xucred, whose second word is the user; LOCAL_PEERPID the process.
    uid = struct.unpack_from("=II", connection.getsockopt(0, 1, 76))[1]
    pid = struct.unpack("i", connection.getsockopt(0, 2, 4))[0] if sys.platform == "darwin" else 0
    return pid, uid
