"""Every error that leaves this package, in one tree.

    MlxMcpError
    ├── RequestError              the caller's mistake; the text names the next step
    │   ├── InvalidRequest        an argument is missing, malformed or out of range
    │   ├── PromptTooLong         prompt and answer do not fit the model's context
    │   ├── RequestTooLarge       prompt and answer do not fit the memory for keys and values
    │   ├── UnknownModel          no such model here
    │   ├── UnknownSession        no such session of this caller, or no more
    │   ├── UnknownResult         no such result of this caller, or no more
    │   ├── UnknownReply          no stored answer of this caller, or no more
    │   ├── UnknownVersion        no version of that name of a session or sandbox was persisted
    │   ├── OtherTokenizer        a session was kept with another tokenizer than its model has now
    │   ├── NotOnDisk             nothing of such a session is on disk
    │   ├── ModelBusy             a model that calls use is not unloaded
    │   ├── SessionBusy           another turn goes on with this session
    │   ├── UnknownSandbox        no such sandbox of this caller, or no more
    │   ├── SandboxBusy           another program runs in this sandbox
    │   ├── OtherInterpreter      a sandbox was kept by another version of its interpreter, and cannot be rebuilt
    │   └── BudgetSpent           a run of a workflow has used what it may
    ├── CapacityError             full for now; retry after `retry_after_s`
    │   └── RateLimited           this principal has used what it may for now
    ├── ModelError                a model cannot be served: broken files, unsupported, too large
    ├── GenerationFailed          this generation broke; the engine goes on
    ├── StorageError              what should be kept on disk cannot be now: full, read-only, failing
    │   ├── FolderInUse           another process keeps its cache there
    │   └── NotKeptHere           this engine has no cache folder open
    ├── ConfigError               the server was started with settings that cannot work
    ├── SandboxFailed             no sandbox can be started or restored here
    ├── InstallError              this server cannot be registered with a host, or taken out again
    ├── EngineUnavailable         the user's engine process does not start or answer, or its place is taken
    ├── NoSharedEngine            this system can have no engine process: everything runs in one's own
    ├── EngineDead                the engine thread is gone; nothing but another process helps
    └── Abandoned                 nobody waits for this any more; no caller sees it

Texts are written for whoever can act: the calling model for a `RequestError`, the user for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable


class MlxMcpError(Exception):
    """The root: `except MlxMcpError` catches everything this package raises on purpose."""


class RequestError(MlxMcpError):
    """The caller could have avoided this."""


class InvalidRequest(RequestError):
    """An argument is missing, malformed or out of range."""


class PromptTooLong(RequestError):
    """The prompt, or the prompt and the wished answer, exceed the model's context."""

    def __init__(self, prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> None:
        """`max_tokens` is None where the caller gave none: then the prompt alone is too long."""
        self.prompt_tokens, self.max_tokens, self.context_tokens = prompt_tokens, max_tokens, context_tokens
        room = context_tokens - prompt_tokens
        asked = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
        step = (
            f"Lower max_tokens to {room} or less, or shorten the prompt."
            if room > 0
            else f"Shorten the prompt to fewer than {context_tokens} tokens, or choose a model with a longer context "
            "(list_models shows each)."
        )
        super().__init__(
            f"The prompt has {prompt_tokens} tokens{asked}, but the model's context is {context_tokens} tokens. {step}"
        )


class RequestTooLarge(RequestError):
    """The keys and values of prompt and answer would not fit in memory if nothing else ran."""

    def __init__(self, prompt_tokens: int, need_bytes: int, limit_bytes: int, max_tokens: int) -> None:
        self.need_bytes, self.limit_bytes, self.max_tokens = need_bytes, limit_bytes, max_tokens
        lower = f"Lower max_tokens to {max_tokens} or less (left out it is 512)"
        step = lower if max_tokens > 0 else "Shorten the prompt"
        super().__init__(
            f"The prompt of {prompt_tokens} tokens and its answer need {need_bytes / 1e6:.1f} MB for keys and values, "
            f"and the server may use {limit_bytes / 1e6:.1f} MB. {step}, or have the server started with a larger "
            "max_kv_bytes, or with kv_bits."
        )


class UnknownModel(RequestError):
    """No model of that name can be served here."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.name, self.known = name, known
        # Names without their owners, so that a wrong or missing owner is forgiven.
        plain = {each.rpartition("/")[2].lower().replace("-", "_"): each for each in reversed(known)}
        near = nearest(name[:200].rpartition("/")[2], plain)
        meant = f" Did you mean {plain[near]!r}?" if near else ""
        shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        super().__init__(f"Model not found: {name[:200]!r}.{meant} Call list_models for valid names; now: {shown}.")


class UnknownSession(RequestError):
    """The caller has no session of that handle or name."""

    def __init__(self, session: str, damaged: bool = False, names: Iterable[str] = ()) -> None:
        """`names` are those of the caller's sessions."""
        near = nearest(session, [name for name in names if name])
        meant = f"Did you mean {near!r}? " if near else ""
        why = (
            "What was kept of it on disk is damaged"
            if damaged
            else "It was closed, has expired, or ended with the server"
        )
        super().__init__(
            f"Session not found: {session[:80]!r}. {meant}{why}. list_sessions shows yours; create_session, or "
            "generate with keep=true, opens one."
        )


class UnknownResult(RequestError):
    """The caller has no result of that handle."""

    def __init__(self, result_id: str, kept_s: int) -> None:
        super().__init__(
            f"Result not found: {result_id[:80]!r}. Results are kept for {kept_s} s after their end, and end with the "
            "server. get_result without a result_id lists yours; if it is gone, make the call again."
        )


class UnknownReply(RequestError):
    """The caller has no stored answer of that id."""

    def __init__(self, reply_id: str) -> None:
        super().__init__(
            f"Response not found: {reply_id[:80]!r}. It was deleted, was made with store=false, or has ended: a stored "
            "response is a session, which ends when it is not used for session_ttl_s, when newer ones need its place, "
            "and with the server. Send the whole conversation again."
        )


class UnknownVersion(RequestError):
    """Nothing of the session or sandbox was persisted under that name."""

    def __init__(self, session: str, version: str, known: tuple[str, ...]) -> None:
        shown = ", ".join(known[:8]) or "none"
        super().__init__(
            f"{session[:80]!r} has no version {version[:80]!r} on disk; it has: {shown}. persist_session makes one."
        )


class OtherTokenizer(RequestError):
    """A session's tokens were written by another tokenizer than its model has now: to that they say something else."""

    def __init__(self, session: str, model: str) -> None:
        super().__init__(
            f"Session {session[:80]!r} was kept with another tokenizer than {model[:80]!r} has now, so its tokens no "
            "longer mean the same. Begin a new session; `mlx-mcp sessions show` tells a user what was said in this one."
        )


class NotOnDisk(RequestError):
    """Nothing of a session or sandbox, or of one version of it, is on disk; for whoever is at a terminal."""

    def __init__(
        self,
        session: str,
        version: str = "",
        known: tuple[str, ...] = (),
        in_memory: bool = False,
        kind: str = "session",
    ) -> None:
        self.known = known
        command = {"session": "sessions list", "sandbox": "sandbox list"}[kind]
        if in_memory:
            text = f"{kind.capitalize()} {session[:80]!r} is in memory only. Have it persisted first (persist_session)."
        elif known:
            what = f"version {version[:80]!r}" if version else "current state"
            shown = ", ".join(repr(each) for each in known[:8] if each) or "none"
            text = (
                f"{kind.capitalize()} {session[:80]!r} has no {what} on disk. Give one of its versions (--version): "
                f"{shown}."
            )
        else:
            text = f"{kind.capitalize()} not found: {session[:80]!r}. `mlx-mcp {command}` shows those that are on disk."
        super().__init__(text)


class ModelBusy(RequestError):
    """A model cannot be unloaded now."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name[:80]!r} cannot be unloaded now: {why}. Wait for its calls to end, or cancel them.")


class SessionBusy(RequestError):
    """Another turn goes on with the session, or its first has not ended."""

    def __init__(self, session: str, first: bool = False) -> None:
        what = (
            "its context is still being computed. Wait until that call has returned."
            if first
            else "another turn goes on with it. Wait for that, have generate wait with queue=true, or fork_session and "
            "go on with the fork."
        )
        super().__init__(f"session_busy: {session[:80]!r} cannot be used now: {what}")


class UnknownSandbox(RequestError):
    """The caller has no sandbox of that handle or name."""

    def __init__(self, sandbox: str, names: Iterable[str] = (), damaged: bool = False) -> None:
        """`names` are those of the caller's sandboxes."""
        near = nearest(sandbox[:200], [name for name in names if name])
        meant = f"Did you mean {near!r}? " if near else ""
        why = (
            "What was kept of it on disk is damaged"
            if damaged
            else "It was closed, has expired, or ended with the server"
        )
        super().__init__(
            f"Sandbox not found: {sandbox[:80]!r}. {meant}{why}. "
            "list_sessions shows yours; sandbox_run without `sandbox` makes one."
        )


class SandboxBusy(RequestError):
    """Another program runs in the sandbox."""

    def __init__(self, sandbox: str) -> None:
        super().__init__(
            f"sandbox_busy: another program runs in {sandbox[:80]!r}. Wait for that call, or fork_session and run "
            "yours in the fork, which begins where the latest finished program ended."
        )


class OtherInterpreter(RequestError):
    """A sandbox was kept by another version of its interpreter, and its state cannot be rebuilt."""

    def __init__(self, theirs: str, ours: str, why: str) -> None:
        super().__init__(
            f"The sandbox was kept by {theirs[:80]!r}, here is {ours[:80]!r}, and its variables cannot be rebuilt: "
            f"{why}. Begin a new one (sandbox_run), or have that version of the interpreter installed."
        )


class BudgetSpent(RequestError):
    """A run of a workflow has made the calls, used the tokens or taken the time that it may; the text says which."""


class CapacityError(MlxMcpError):
    """Full for now; the same call may succeed after `retry_after_s` seconds."""

    def __init__(self, why: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{why} Retry in {retry_after_s:g} s.")


class RateLimited(CapacityError):
    """A principal has used as much as it may; the text names the limit and what is used."""


class ModelError(MlxMcpError):
    """A model cannot be served; the text says why and what to do."""


class GenerationFailed(MlxMcpError):
    """One generation broke inside the engine, which dropped it and goes on."""


class StorageError(MlxMcpError):
    """Something cannot be kept on disk now; what was kept before still is, and generations go on."""


class FolderInUse(StorageError):
    """Another process has the cache folder open; this one can go on in memory only."""

    def __init__(self, folder: str, pid: int, started_at: float) -> None:
        self.pid, self.started_at = pid, started_at
        super().__init__(
            f"The cache folder {folder} is in use by another process{f' (pid {pid})' if pid else ''}. "
            "Nothing is kept on disk here; stop that process (`mlx-mcp engine stop`, if it is the engine), or set "
            "MLX_MCP_STORE_DIR to another folder."
        )


class NotKeptHere(StorageError):
    """This engine has no cache folder open, so what is in one is none of its business."""

    def __init__(self) -> None:
        super().__init__("This engine keeps nothing on disk.")


class ConfigError(MlxMcpError):
    """The settings cannot work together; raised before anything is served."""


class SandboxFailed(MlxMcpError):
    """No sandbox can be started or restored here; the text says why and what to do."""


class InstallError(MlxMcpError):
    """This server cannot be registered with a host, or taken out again, and nothing was changed; the text says why."""


class EngineUnavailable(MlxMcpError):
    """The user's engine process does not start or answer, or something else is in its place; the text says which."""


class NoSharedEngine(MlxMcpError):
    """There can be no engine process beside this one; the text says why, and reads on from "since"."""


class EngineDead(MlxMcpError):
    """The engine thread has ended; every waiter hears this."""

    def __init__(self, cause: str = "it was stopped") -> None:
        self.cause = cause
        super().__init__(f"The engine is not running ({cause}). Call again; if that does not help, restart the server.")


class Abandoned(MlxMcpError):
    """Nobody waits for this work any more, so it was stopped; no caller sees this."""

    def __init__(self) -> None:
        super().__init__("Nobody waits for this any more.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant by an unknown one, for an error's text; nothing if none is alike."""
    import difflib  # only for errors: the relay is to be up in a blink

    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)), "")
