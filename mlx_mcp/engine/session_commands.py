"""Commands about sessions: lists, forks, persists and closes them. Engine thread only.

Each time that a command has what it waited for, it is carried out from the beginning, until it is answered.
"""

from __future__ import annotations

from dataclasses import replace

from mlx_mcp.core.session import Session, SessionStore
from mlx_mcp.core.session_names import NAME
from mlx_mcp.engine.awaited import SessionsRemoving, SessionWriting, VersionReading
from mlx_mcp.engine.call import Call, Calls
from mlx_mcp.engine.messages import (
    Close,
    Event,
    Failed,
    Fork,
    ListSessions,
    Persist,
    Persisted,
    ReadTokens,
    Sessions,
    SessionTokens,
)
from mlx_mcp.engine.persistence import Persistence
from mlx_mcp.engine.results import SessionsRemoved, SessionWritten, VersionRead
from mlx_mcp.engine.turns import Turns
from mlx_mcp.errors import (
    InvalidRequest,
    MlxMcpError,
    SessionBusy,
    StorageError,
    UnknownSession,
    UnknownVersion,
)

MAX_VERSIONS = 64  # of one session on disk


class SessionCommands:
    """Carries out the commands in `AboutSessions`."""

    def __init__(self, calls: Calls, sessions: SessionStore, turns: Turns, persistence: Persistence | None) -> None:
        self.calls, self.sessions, self.turns, self.persistence = calls, sessions, turns, persistence

    def carry_out(self, call: Call) -> None:
        """Answer a command about sessions, or have it wait for the disk.

        Raises:
            MlxMcpError: the command cannot be carried out.
        """
        match call.request:
            case ListSessions(_, tenant, weigh):
                theirs = self._of(tenant)
                event = sessions_event(theirs)
                self.calls.answer(call, replace(event, held_bytes=held_bytes(theirs)) if weigh else event)
            case Fork() as command:
                self._fork(call, command)
            case Persist() as command:
                self._persist(call, command)
            case Close() as command:
                self._close(call, command)
            case ReadTokens() as command:
                self._read_tokens(call, command)

    def on_version_read(self, result: VersionRead) -> None:
        """Fork a version of a session that has been read."""
        for call in self.calls.wake(VersionReading(result.call_id)):
            command, record = call.request, result.outcome
            assert isinstance(command, Fork), f"{command} forks no version"
            try:
                if isinstance(record, MlxMcpError):
                    raise record
                if record is None:
                    raise UnknownSession(command.session, damaged=True)
                session = self.sessions.get(command.tenant, command.session)
                forks = self.sessions.fork(session, command.count, command.names, record)
            except MlxMcpError as error:
                self.calls.fail(call, error)
            else:
                self.calls.answer(call, sessions_event(forks))

    def on_session_written(self, result: SessionWritten, session: Session) -> bool:
        """Answer the calls that waited for a session to be written; returns whether there were any."""
        event: Event
        if isinstance(result.outcome, MlxMcpError):
            event = Failed(result.outcome)
        else:
            record, num_bytes = result.outcome
            event = Persisted(session.info, record.version, record.num_kept, num_bytes)
        calls = self.calls.wake(SessionWriting(result.number))
        for call in calls:
            self.calls.answer(call, event)
        return bool(calls)

    def on_sessions_removed(self, result: SessionsRemoved) -> bool:
        """Answer the calls that waited for closed sessions to be removed from disk; returns whether there were any."""
        calls = self.calls.wake(SessionsRemoving(result.call_id))
        for call in calls:
            self.calls.answer(call, Failed(result.outcome) if result.outcome else Sessions(result.closed))
        return bool(calls)

    def _of(self, tenant: str) -> list[Session]:
        return [session for session in self.sessions.sessions.values() if session.tenant == tenant]

    def _fork(self, call: Call, command: Fork) -> None:
        session = self.sessions.get(command.tenant, command.session)
        if command.version:
            if self.persistence is None or command.version not in session.versions:
                raise UnknownVersion(command.session, command.version, tuple(sorted(session.versions)))
            self.persistence.read_version(session, command.version, call.call_id)
            self.calls.wait(call, VersionReading(call.call_id))
        elif session.on_disk_only and self.persistence is not None:
            self.calls.wait(call, self.persistence.read(session))
        else:
            self.calls.answer(call, sessions_event(self.sessions.fork(session, command.count, command.names)))

    def _close(self, call: Call, command: Close) -> None:
        # All are looked up before any is closed.
        closing = list(dict.fromkeys(self.sessions.get(command.tenant, name) for name in command.sessions))
        if not command.sessions:
            closing = [session for session in self._of(command.tenant) if not session.persisted]
        event = sessions_event(closing)
        for session in closing:
            self.turns.close(session)
        if self.persistence is not None and self.persistence.remove(closing, call.call_id, event.infos):
            self.calls.wait(call, SessionsRemoving(call.call_id))
        else:
            self.calls.answer(call, event)

    def _read_tokens(self, call: Call, command: ReadTokens) -> None:
        session = self.sessions.get(command.tenant, command.session)
        if session.on_disk_only and self.persistence is not None:
            self.calls.wait(call, self.persistence.read(session))
            return
        text = "" if session.unverified is None else session.unverified.text
        self.calls.answer(call, SessionTokens(session.info, session.log, session.tokenizer, text, session.origins))

    def _persist(self, call: Call, command: Persist) -> None:
        session = self.sessions.get(command.tenant, command.session)
        if self.persistence is None:
            raise StorageError(
                "This server keeps nothing on disk: it was started with max_ssd_bytes = 0. Have it started "
                "without that."
            )
        if session.options.ephemeral:
            raise InvalidRequest(
                "The session is ephemeral, so nothing of it is kept. Create it without `ephemeral` to persist it."
            )
        if not session.known:
            raise SessionBusy(command.session, first=True)
        if command.version and not NAME.fullmatch(command.version):
            raise InvalidRequest(
                f"{command.version[:80]!r} cannot be a version: take 1 to 64 letters, digits, dots, dashes, "
                "underscores."
            )
        if command.version and len(session.versions | {command.version}) > MAX_VERSIONS:
            raise InvalidRequest(
                f"The session has {MAX_VERSIONS} versions, as many as it may; take one of their names."
            )
        if session.on_disk_only and session.durable is not None and not (command.version or session.on_disk_version):
            self.calls.answer(call, Persisted(session.info, "", session.durable[1], 0))
        elif session.on_disk_only:
            self.calls.wait(call, self.persistence.read(session))
        else:
            self.calls.wait(call, self.persistence.persist(session, command.version))


def held_bytes(sessions: list[Session]) -> int:
    """What sessions hold of keys and values in memory; a block that several of them begin with counts once."""
    seen: set[int] = set()
    total = 0
    for session in sessions:
        block = session.leaf
        while block is not None and id(block) not in seen:
            seen.add(id(block))
            total += block.nbytes
            block = block.parent
    return total


def sessions_event(sessions: list[Session]) -> Sessions:
    """The event with sessions as they are now."""
    return Sessions(tuple(session.info for session in sessions))
