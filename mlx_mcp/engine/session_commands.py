"""Commands about sessions: listing, forking, persisting, closing them, and what has to wait for the disk first.

A command that waits is handled again once what it waits for is there, unless it was cancelled meanwhile. Engine thread
only.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_mcp.core.durable import SessionRecord
from mlx_mcp.core.ports import LoadedModel
from mlx_mcp.core.session import NAME, Session, SessionStore
from mlx_mcp.engine.messages import (
    Close,
    Event,
    Failed,
    Fork,
    ListSessions,
    OnDisk,
    Persist,
    Persisted,
    Sessions,
    Sink,
    Submit,
)
from mlx_mcp.engine.persistence import Persistence
from mlx_mcp.errors import (
    EngineDead,
    InvalidRequest,
    MlxMcpError,
    OtherTokenizer,
    SessionBusy,
    StorageError,
    UnknownSession,
    UnknownVersion,
)

MAX_VERSIONS = 64  # of one session on disk
AboutSessions = Fork | Close | ListSessions | Persist


class SessionCommands:
    """Carries them out; `handle` takes a command that has waited, `close` ends a session and its turns."""

    def __init__(
        self,
        sessions: SessionStore,
        persistence: Persistence | None,
        handle: Callable[[Submit | AboutSessions | OnDisk], None],
        close: Callable[[Session], None],
    ) -> None:
        self.sessions, self.persistence, self._handle, self._close = sessions, persistence, handle, close
        # Commands that wait for the store: turns by sequence id, others by what tells them apart.
        self.coming: dict[int | tuple[str, int], Submit | AboutSessions | OnDisk] = {}

    def cancel(self, sequence_id: int) -> None:
        """Forget a turn that waits."""
        self.coming.pop(sequence_id, None)

    def fail_all(self, error: MlxMcpError) -> None:
        """Tell whoever waits that nothing more will come."""
        waiting, self.coming = self.coming, {}
        for command in waiting.values():
            command.sink(Failed(error))

    def stop(self) -> None:
        """Fail whoever waits but for a session to be written: that is still being done."""
        coming, self.coming = self.coming, {}
        for key, command in coming.items():
            if isinstance(command, Persist):
                self.coming[key] = command
            else:
                command.sink(Failed(EngineDead()))

    def carry_out(self, command: AboutSessions) -> None:
        """Answer a command about sessions, now or when the disk has.

        Raises:
            MlxMcpError: it cannot be carried out.
        """
        mine = [s for s in self.sessions.sessions.values() if s.tenant == command.tenant]
        match command:
            case ListSessions():
                tell_sessions(command.sink, mine)
            case Fork(tenant, name, count, names, sink, version):
                session = self.sessions.get(tenant, name)
                if version:
                    self._fork_version(command, session)
                elif self.is_here(command, session):
                    tell_sessions(sink, self.sessions.fork(session, count, names))
            case Persist(tenant, name, _, _):
                self._persist(command, self.sessions.get(tenant, name))
            case Close(tenant, names, sink):
                # All are looked up before any is closed.
                closing = list(dict.fromkeys(self.sessions.get(tenant, name) for name in names))
                if not names:
                    closing = [session for session in mine if not session.persisted]
                event = Sessions(tuple(session.info for session in closing))
                for session in closing:
                    self._close(session)
                if self.persistence is None:
                    sink(event)
                else:
                    answer = self._later(command)
                    self.persistence.remove(closing, lambda error: answer(Failed(error) if error else event))

    def too_early(self, command: Submit | AboutSessions | OnDisk) -> bool:
        """Whether a command waits until the sessions on disk are known."""
        if self.persistence is None or not self.persistence.opening:
            return False
        answer = self._later(command)
        self.persistence.when_open(lambda: answer(None))
        return True

    def _later(self, command: Submit | AboutSessions | OnDisk) -> Callable[[Event | None], None]:
        """What takes the answer to a command that has to wait, or None to handle it again; not if it was cancelled."""
        key = command.sequence_id if isinstance(command, Submit) else ("about sessions", id(command))
        self.coming[key] = command

        def answer(event: Event | None) -> None:
            if self.coming.pop(key, None) is None:
                return
            if event is None:
                self._handle(command)
            else:
                command.sink(event)

        return answer

    def is_here(self, command: Submit | Fork | Persist, session: Session, model: LoadedModel | None = None) -> bool:
        """Whether a session's tokens are here; if not, the command waits.

        Raises:
            OtherTokenizer: they are not what the session's model, if that is given, would read.
        """
        if self.persistence is None:
            return True
        if session.resting:
            answer = self._later(command)
            self.persistence.wake(session, lambda error: answer(Failed(error) if error else None))
            return False
        foreign = session.foreign
        if foreign is None or model is None:
            return True
        if model.fingerprint != foreign.fingerprint and model.tokenizer.digest != foreign.tokenizer:
            raise OtherTokenizer(session.session_id, model.name)
        session.foreign = None
        return True

    def _fork_version(self, command: Fork, session: Session) -> None:
        if self.persistence is None or command.version not in session.versions:
            raise UnknownVersion(command.session, command.version, tuple(sorted(session.versions)))
        answer = self._later(command)

        def read(outcome: SessionRecord | MlxMcpError | None) -> None:
            try:
                if outcome is None or not self.sessions.is_open(session):
                    raise UnknownSession(command.session, damaged=outcome is None)
                if isinstance(outcome, MlxMcpError):
                    raise outcome
                forks = self.sessions.fork(session, command.count, command.names, outcome)
            except MlxMcpError as error:
                answer(Failed(error))
            else:
                answer(Sessions(tuple(fork.info for fork in forks)))

        self.persistence.version(session, command.version, read)

    def _persist(self, command: Persist, session: Session) -> None:
        if self.persistence is None:
            raise StorageError("This server keeps nothing on disk: it was started with max_ssd_bytes = 0.")
        if session.options.ephemeral:
            raise InvalidRequest(
                "The session is ephemeral, so nothing of it is kept. Create it without `ephemeral` to persist it."
            )
        if not session.known:
            raise SessionBusy(command.session, first=True)
        if command.version and not NAME.fullmatch(command.version):
            raise InvalidRequest(
                f"{command.version[:80]!r} cannot be a version: 1 to 64 letters, digits, dots, dashes and underscores."
            )
        if command.version and len(session.versions | {command.version}) > MAX_VERSIONS:
            raise InvalidRequest(
                f"The session has {MAX_VERSIONS} versions, as many as it may; take one of their names."
            )
        if session.resting and session.kept is not None and not (command.version or session.resting_as):
            command.sink(Persisted(session.info, "", session.kept[1], 0))
            return
        if not self.is_here(command, session):
            return
        answer = self._later(command)

        def told(outcome: tuple[SessionRecord, int] | MlxMcpError) -> None:
            if isinstance(outcome, MlxMcpError):
                answer(Failed(outcome))
            else:
                record, num_bytes = outcome
                answer(Persisted(session.info, record.version, record.num_kept, num_bytes))

        try:
            self.persistence.persist(session, command.version, told)
        except MlxMcpError as error:
            answer(Failed(error))


def tell_sessions(sink: Sink, sessions: list[Session]) -> None:
    """Answer with sessions as they are now."""
    sink(Sessions(tuple(session.info for session in sessions)))
