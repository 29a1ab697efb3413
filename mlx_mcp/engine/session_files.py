"""Sessions on disk while the engine has the folder open: lists, reads, removes, purges, exports and imports them.

Decides on the engine thread, so that memory and disk always agree. `Io` reads and writes files elsewhere, in this
order:

    remove    find it ─ end it in memory ─ remove its files
    purge     wait for transfers ─ end in memory whatever is on disk ─ remove all files
    export    wait for other transfers ─ write its blocks, with pauses for whatever else is to be read or written
    import    wait for other transfers ─ read all of the file ─ see that nothing is lost by it, and end the one that it
              replaces, in memory ─ write ─ know what is on disk now

Whatever was being written before is written first. A removal ends the turns of a session that is in use; an import
never does.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from mlx_mcp.core.cache.blocks import walk
from mlx_mcp.core.durable import SessionHead, SessionRecord, Store, Transfer, check_name, find_heads
from mlx_mcp.core.session import SessionStore
from mlx_mcp.core.session_names import NAME
from mlx_mcp.engine.awaited import FileWork
from mlx_mcp.engine.call import Call, Calls
from mlx_mcp.engine.messages import Export, Heads, Import, OnDisk, Purge, Read, Remove, Told
from mlx_mcp.engine.persistence import PAUSE, Persistence
from mlx_mcp.engine.results import (
    FileResult,
    FilesRead,
    ImportDone,
    ImportFound,
    PurgeDone,
    PurgeFound,
    RemovalDone,
    RemovalFound,
)
from mlx_mcp.engine.turns import Turns
from mlx_mcp.errors import InvalidRequest, MlxMcpError, NotKeptHere, NotOnDisk, StorageError

POLL_S = 0.02


class SessionFiles:
    """Carries out `OnDisk`. Engine thread only."""

    def __init__(self, calls: Calls, sessions: SessionStore, turns: Turns, persistence: Persistence | None) -> None:
        self.calls, self.sessions, self.turns, self.persistence = calls, sessions, turns, persistence

    def carry_out(self, call: Call) -> None:
        """Begin what was asked for. The call is answered when the result has come back.

        Raises:
            NotKeptHere: there is no store.
        """
        persistence, command = self.persistence, call.request
        if persistence is None or persistence.store is None:
            raise NotKeptHere
        assert isinstance(command, OnDisk), f"{command} is not about the disk"
        store, submit, call_id = persistence.store, persistence.io.submit, call.call_id
        match command.what:
            case Heads():
                submit(store.sessions.heads, partial(FilesRead, call_id), urgent=True)
            case Read(session, version):
                submit(lambda: read(store, session, version), partial(FilesRead, call_id), urgent=True)
            case Remove(session, what):
                submit(lambda: find_heads(store.sessions.heads(), session, what), partial(RemovalFound, call_id))
            case Purge():
                submit(store.sessions.heads, partial(PurgeFound, call_id), background=True)
            case Export(session, version, transfer):
                self._begin_transfer(persistence, transfer)

                def export() -> int:
                    (head,) = find_heads(store.sessions.heads(), session, version)
                    return store.export(head.session_id, version, transfer)

                submit(export, partial(FilesRead, call_id), background=True)
            case Import(transfer):
                self._begin_transfer(persistence, transfer)
                submit(lambda: store.verify_export(transfer), partial(ImportFound, call_id), background=True)
        self.calls.wait(call, FileWork(call_id))

    def on_result(self, result: FileResult) -> None:
        """Continue the call for which this result came back."""
        for call in self.calls.wake(FileWork(result.call_id)):
            try:
                self._continue(call, result)
            except MlxMcpError as error:
                self.calls.fail(call, self._explained(call, error))

    def stop(self) -> None:
        """Have all transfers end before their next part."""
        for call in self.calls:
            if isinstance(call.request, OnDisk) and isinstance(call.request.what, Export | Import):
                call.request.what.transfer.stop()

    def _continue(self, call: Call, result: FileResult) -> None:
        """Answer a call, or do the next part of what it asked for.

        Raises:
            MlxMcpError: it failed.
        """
        if isinstance(result.outcome, MlxMcpError):
            raise result.outcome
        match result:
            case FilesRead(_, answer):
                self.calls.answer(call, Told(answer))
            case RemovalFound(_, list(heads)):
                self._remove(call, heads[0].session_id)
            case RemovalDone(_, session_id, (num_removed, left)):
                session = self.sessions.sessions.get(session_id)
                if session is not None:
                    self.sessions.note_removed(session, left)
                self.calls.answer(call, Told(num_removed))
            case PurgeFound(_, list(heads)):
                self._purge(call, heads)
            case PurgeDone():
                self._forget_purged()
                self.calls.answer(call, Told(None))
            case ImportFound(_, SessionRecord() as record):
                self._import(call, record)
            case ImportDone(_, (came, heads)):
                self.sessions.adopt_all(heads)
                if isinstance(came, MlxMcpError):
                    raise came
                self.calls.answer(call, Told(came))

    def _explained(self, call: Call, error: MlxMcpError) -> MlxMcpError:
        """The error for a call. If a session is not on disk, it says whether it is in memory."""
        what = call.request.what if isinstance(call.request, OnDisk) else None
        if not isinstance(error, NotOnDisk) or error.known or not isinstance(what, Read | Remove | Export):
            return error
        in_memory = any(what.session in (one.session_id, one.options.name) for one in self.sessions.sessions.values())
        return NotOnDisk(what.session, in_memory=True) if in_memory else error

    def _begin_transfer(self, persistence: Persistence, transfer: Transfer) -> None:
        since = time.monotonic()

        def between() -> None:
            """Let other work have the disk, and while the engine computes, the cores and the memory."""
            nonlocal since
            pause_s = PAUSE * (time.monotonic() - since) if persistence.engine_busy else 0.0
            until = time.monotonic() + pause_s
            persistence.io.run_others()
            while time.monotonic() < until and not transfer.stopped:
                time.sleep(POLL_S)
                persistence.io.run_others()
            since = time.monotonic()

        transfer.between = between

    def _work(self, call: Call) -> tuple[Persistence, Store, OnDisk]:
        """Have a call wait for the disk again; returns what its next part needs."""
        assert self.persistence is not None, "a store that was there is gone"
        assert isinstance(call.request, OnDisk), f"{call.request} is not about the disk"
        self.calls.wait(call, FileWork(call.call_id))
        return self.persistence, self.persistence.require_store(), call.request

    def _remove(self, call: Call, session_id: str) -> None:
        persistence, store, command = self._work(call)
        assert isinstance(command.what, Remove), f"{command} removes nothing"
        session, version = self.sessions.sessions.get(session_id), command.what.version
        if session is not None and version is None:
            self.turns.close(session)

        def remove() -> tuple[int, list[SessionHead]]:
            return store.remove(session_id, version), heads_of(store, session_id)

        persistence.io.submit(remove, partial(RemovalDone, call.call_id, session_id))

    def _purge(self, call: Call, heads: list[SessionHead]) -> None:
        persistence, store, _ = self._work(call)
        ids = {head.session_id for head in heads}
        for session in list(self.sessions.sessions.values()):
            if session.persisted or session.session_id in ids:
                self.turns.close(session)
        persistence.io.submit(store.purge, partial(PurgeDone, call.call_id), background=True)

    def _forget_purged(self) -> None:
        for session in list(self.sessions.sessions.values()):  # some were persisted during the purge
            if session.persisted:
                self.sessions.note_removed(session, [])
        # Blocks in memory are offloaded again only if they are used again from now on.
        for root in self.sessions.pool.roots.values():
            for block in walk(root):
                block.num_hits = 0

    def _import(self, call: Call, record: SessionRecord) -> None:
        what = call.request.what if isinstance(call.request, OnDisk) else None
        assert isinstance(what, Import), f"{what} imports nothing"
        record = replace(record, name=what.name or record.name)
        self._close_replaced(record)
        persistence, store, _ = self._work(call)

        def write() -> tuple[SessionHead | MlxMcpError, list[SessionHead]]:
            came: SessionHead | MlxMcpError
            try:
                came = store.import_(what.transfer, what.name)
            except MlxMcpError as error:
                came = error
            return came, heads_of(store, record.session_id)

        persistence.io.submit(write, partial(ImportDone, call.call_id), background=True)

    def _close_replaced(self, record: SessionRecord) -> None:
        """Close the session that an import replaces.

        Raises:
            InvalidRequest: something of it would be lost, or another session has the name.
        """
        if record.name and not NAME.fullmatch(record.name):
            raise InvalidRequest(
                f"{record.name[:80]!r} cannot be a name: take 1 to 64 letters, digits, dots, dashes, underscores."
            )
        owner_id = self.sessions.names.find(record.tenant, record.name)
        if owner_id is not None:
            check_name(record, owner_id)
        session = self.sessions.sessions.get(record.session_id)
        if session is None:
            return
        if session.turn is not None:
            raise InvalidRequest(
                f"A turn goes on with session {record.session_id}: import it once that has ended, or remove the "
                "session first (`mlx-mcp sessions rm`)."
            )
        if not session.on_disk_only and session.saved_log is not session.log:
            raise InvalidRequest(
                f"Session {record.session_id} has gone on since it was persisted, and the import would replace that. "
                "Have it persisted and exported, or remove it first (`mlx-mcp sessions rm`)."
            )
        self.sessions.close(session)


def read(store: Store, session: str, version: str) -> SessionRecord:
    """Read a session as it is on disk.

    Raises:
        NotOnDisk: the session is not there.
        StorageError: the session is damaged.
    """
    (head,) = find_heads(store.sessions.heads(), session, version)
    record = store.sessions.load(head.session_id, version)
    if record is None:
        raise StorageError(
            f"What was kept of session {session[:80]!r} is damaged. Remove it: `mlx-mcp sessions rm {session[:80]}`."
        )
    return record


def heads_of(store: Store, session_id: str) -> list[SessionHead]:
    """The heads of all versions of a session."""
    return [head for head in store.sessions.heads() if head.session_id == session_id]
