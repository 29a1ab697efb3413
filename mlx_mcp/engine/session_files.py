"""What a user does to sessions on disk while the engine has the folder open: list, read, remove, purge, export, import.

Decides on the engine thread, so that sessions in memory and on disk never say two things; files are read and written
elsewhere, by `Io`, in this order:

    remove    find it ─ end it in memory ─ remove its files
    purge     wait for transfers ─ end in memory whatever is on disk ─ remove all files
    export    wait for other transfers ─ write its blocks, with pauses for whatever else is to be read or written
    import    wait for other transfers ─ read all of the file ─ see that nothing is lost by it, and end the one that it
              replaces, in memory ─ write ─ know what is on disk now

What was on its way to the disk before gets there before. Whoever replaces or removes a session that is used meanwhile
ends its turns; an import never does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_mcp.core.cache.blocks import walk
from mlx_mcp.core.durable import SessionHead, SessionRecord, Store, Transfer, check_name, find_heads
from mlx_mcp.core.session import NAME, Session, SessionStore
from mlx_mcp.engine.messages import Export, Failed, Heads, Import, OnDisk, Purge, Read, Remove, Sink, Told
from mlx_mcp.engine.persistence import PAUSE, Persistence
from mlx_mcp.errors import InvalidRequest, MlxMcpError, NotKeptHere, NotOnDisk, StorageError

Tell = Callable[[Any], None]  # takes what came of it, or an MlxMcpError
POLL_S = 0.02


class SessionFiles:
    """Carries out `OnDisk`; `close` ends a session in memory, and its turns. Engine thread only."""

    def __init__(
        self, sessions: SessionStore, persistence: Persistence | None, close: Callable[[Session], None]
    ) -> None:
        self.sessions, self.persistence, self._close = sessions, persistence, close
        self.waiting: dict[int, Sink] = {}
        self.transfers: set[Transfer] = set()

    def carry_out(self, command: OnDisk) -> None:
        """Answer now, or when the disk has."""
        key = id(command)
        self.waiting[key] = command.sink

        def tell(outcome: Any) -> None:
            if isinstance(command.what, Export | Import):
                self.transfers.discard(command.what.transfer)
            sink = self.waiting.pop(key, None)
            if sink is not None:
                sink(Failed(outcome) if isinstance(outcome, MlxMcpError) else Told(outcome))

        try:
            self._begin(command, tell)
        except MlxMcpError as error:
            tell(error)

    def stop(self) -> None:
        """End transfers at their next part."""
        for transfer in self.transfers:
            transfer.stop()

    def fail_all(self, error: MlxMcpError) -> None:
        """Tell whoever waits that nothing more will come."""
        waiting, self.waiting = self.waiting, {}
        for sink in waiting.values():
            sink(Failed(error))

    def _begin(self, command: OnDisk, tell: Tell) -> None:
        persistence = self.persistence
        if persistence is None or persistence.store is None:
            raise NotKeptHere
        store, submit = persistence.store, persistence.io.submit
        match command.what:
            case Heads():
                submit(store.sessions.heads, tell, urgent=True)
            case Read(session, version):
                submit(lambda: read(store, session, version), self._explained(session, tell), urgent=True)
            case Remove() as what:
                self._remove(persistence, store, what, self._explained(what.session, tell))
            case Purge():
                self._purge(persistence, store, tell)
            case Export(session, version, transfer):
                self._begin_transfer(persistence, transfer)

                def export() -> int:
                    (head,) = find_heads(store.sessions.heads(), session, version)
                    return store.export(head.session_id, version, transfer)

                submit(export, self._explained(session, tell), patient=True)
            case Import() as what:
                self._begin_transfer(persistence, what.transfer)
                self._import(persistence, store, what, tell)

    def _explained(self, session: str, tell: Tell) -> Tell:
        """As `tell`, but of a session that is not on disk it says whether it is in memory."""

        def told(outcome: Any) -> None:
            known = any(session in (one.session_id, one.options.name) for one in self.sessions.sessions.values())
            if isinstance(outcome, NotOnDisk) and known and not outcome.known:
                outcome = NotOnDisk(session, in_memory=True)
            tell(outcome)

        return told

    def _begin_transfer(self, persistence: Persistence, transfer: Transfer) -> None:
        self.transfers.add(transfer)
        since = time.monotonic()

        def between() -> None:
            """Let others have the disk, and while the engine computes, the cores and the memory."""
            nonlocal since
            pause_s = PAUSE * (time.monotonic() - since) if persistence.engine_busy else 0.0
            until = time.monotonic() + pause_s
            persistence.io.breathe()
            while time.monotonic() < until and not transfer.stopped:
                time.sleep(POLL_S)
                persistence.io.breathe()
            since = time.monotonic()

        transfer.between = between

    def _remove(self, persistence: Persistence, store: Store, what: Remove, tell: Tell) -> None:
        def found(outcome: list[SessionHead] | MlxMcpError) -> None:
            if isinstance(outcome, MlxMcpError):
                tell(outcome)
                return
            session_id = outcome[0].session_id
            session = self.sessions.sessions.get(session_id)
            if session is not None and what.version is None:
                self._close(session)
                session = None

            def remove() -> tuple[int, list[SessionHead]]:
                return store.remove(session_id, what.version), heads_of(store, session_id)

            def removed(outcome: tuple[int, list[SessionHead]] | MlxMcpError) -> None:
                if isinstance(outcome, MlxMcpError):
                    tell(outcome)
                    return
                num_removed, left = outcome
                if session is not None and self.sessions.is_open(session):
                    self.sessions.removed(session, left)
                tell(num_removed)

            persistence.io.submit(remove, removed)

        def find() -> list[SessionHead]:
            return find_heads(store.sessions.heads(), what.session, what.version)

        persistence.io.submit(find, found)

    def _purge(self, persistence: Persistence, store: Store, tell: Tell) -> None:
        def found(outcome: list[SessionHead] | MlxMcpError) -> None:
            if isinstance(outcome, MlxMcpError):
                tell(outcome)
                return
            ids = {head.session_id for head in outcome}
            for session in list(self.sessions.sessions.values()):
                if session.persisted or session.session_id in ids:
                    self._close(session)
            persistence.io.submit(store.purge, purged, patient=True)

        def purged(outcome: MlxMcpError | None) -> None:
            for session in list(self.sessions.sessions.values()):  # persisted while the purge was waited for
                if session.persisted:
                    self.sessions.removed(session, [])
            # What stays in memory goes to the disk when it is used again, and not for having been used before.
            for root in self.sessions.pool.roots.values():
                for block in walk(root):
                    block.num_hits = 0
            tell(outcome)

        persistence.io.submit(store.sessions.heads, found, patient=True)

    def _import(self, persistence: Persistence, store: Store, what: Import, tell: Tell) -> None:
        transfer = what.transfer

        def looked(outcome: SessionRecord | MlxMcpError) -> None:
            try:
                if isinstance(outcome, MlxMcpError):
                    raise outcome
                record = replace(outcome, name=what.name or outcome.name)
                self._make_way(record)
            except MlxMcpError as error:
                tell(error)
                return

            def write() -> tuple[SessionHead | MlxMcpError, list[SessionHead]]:
                came: SessionHead | MlxMcpError
                try:
                    came = store.import_(transfer, what.name)
                except MlxMcpError as error:
                    came = error
                return came, heads_of(store, record.session_id)

            persistence.io.submit(write, written, patient=True)

        def written(outcome: tuple[SessionHead | MlxMcpError, list[SessionHead]] | MlxMcpError) -> None:
            if isinstance(outcome, MlxMcpError):
                tell(outcome)
                return
            came, heads = outcome
            self.sessions.adopt_all(heads)
            tell(came)

        persistence.io.submit(lambda: store.look_into(transfer), looked, patient=True)

    def _make_way(self, record: SessionRecord) -> None:
        """Let go, in memory, of the session that an import replaces; nothing is lost by that.

        Raises:
            InvalidRequest: it would be, or another session has the name.
        """
        if record.name and not NAME.fullmatch(record.name):
            raise InvalidRequest(
                f"{record.name[:80]!r} cannot be a name: 1 to 64 letters, digits, dots, dashes and underscores."
            )
        owner_id = self.sessions.owner(record.tenant, record.name)
        if owner_id is not None:
            check_name(record, owner_id)
        session = self.sessions.sessions.get(record.session_id)
        if session is None:
            return
        if session.turn is not None or session.queue:
            raise InvalidRequest(
                f"A turn goes on with session {record.session_id}: import it once that has ended, or remove the "
                "session first (`mlx-mcp sessions rm`)."
            )
        if not session.resting and session.saved is not session.log:
            raise InvalidRequest(
                f"Session {record.session_id} has gone on since it was persisted, and the import would replace that. "
                "Have it persisted and exported, or remove it first (`mlx-mcp sessions rm`)."
            )
        self.sessions.close(session)


def read(store: Store, session: str, version: str) -> SessionRecord:
    """A session as it is on disk.

    Raises:
        NotOnDisk: it is not there.
        StorageError: it is damaged.
    """
    (head,) = find_heads(store.sessions.heads(), session, version)
    record = store.sessions.load(head.session_id, version)
    if record is None:
        raise StorageError(f"What was kept of session {session[:80]!r} is damaged and cannot be read.")
    return record


def heads_of(store: Store, session_id: str) -> list[SessionHead]:
    """What is on disk of a session."""
    return [head for head in store.sessions.heads() if head.session_id == session_id]
