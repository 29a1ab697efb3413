"""The settings: one frozen Config. Command line > MLX_MCP_* environment > config.toml > defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from platformdirs import user_config_path, user_data_path
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError

from mlx_mcp.errors import ConfigError, nearest

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PREFIX = "MLX_MCP_"
# The settings that are yes or no.
FLAGS = frozenset(("keep_awake", "openblas", "sampling_defaults", "share_prefixes", "traces"))
# What the environment may say beside settings: where things are, and what the tests of this package set.
PLACES = frozenset(("MLX_MCP_CONFIG", "MLX_MCP_STATE_DIR"))
FOR_TESTS = frozenset(("MLX_MCP_TEST_MODE", "MLX_MCP_FAULT"))


def folders(value: Any) -> Any:
    """Folders written as in PATH, or as a list; `~` is the user's own."""
    listed = value.split(os.pathsep) if isinstance(value, str) else value
    return [Path(folder).expanduser() for folder in listed if folder] if isinstance(listed, list) else listed


def listed(value: Any) -> Any:
    """Words with commas between, or a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


class ModelDefaults(BaseModel):
    """What can be set for models; what is unset is as the model or the other settings have it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context_tokens: int | None = Field(None, ge=16, description="so many tokens of its context are used")
    kv_bits: int | None = Field(None, description="8 or 4, or 0 for as the model has them")
    ttl_s: float | None = Field(None, gt=0, description="how long it stays in memory without a call")
    pinned: bool | None = Field(None, description="never unloaded for other models")
    sampling: dict[str, float] = Field({}, description="defaults for sampling, such as temperature")

    @field_validator("kv_bits")
    @classmethod
    def bits(cls, value: int | None) -> int | None:
        """Refuse what keys and values cannot be stored in."""
        if value not in (None, 0, 4, 8):
            raise ValueError(f"it is {value}, and must be 8 or 4, or 0 for as the model has them")
        return value


class ModelConfig(ModelDefaults):
    """What can be set for one model."""

    alias: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field((), description="further names for it")


class WarmConfig(BaseModel):
    """A context that is to be there as a session without a call having made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the session's name")
    system: str = Field("", description="system prompt")
    files: Annotated[tuple[Path, ...], BeforeValidator(folders)] = Field((), description="text files")
    model: str = Field("", description="name or alias; the default model if not given")
    pinned: bool = Field(True, description="its keys and values are never evicted")

    @model_validator(mode="after")
    def not_empty(self) -> WarmConfig:
        """Refuse a context without anything in it."""
        if not (self.system.strip() or self.files):
            raise ValueError("give `system` or `files`")
        for file in self.files:
            if not file.is_absolute():
                raise ValueError(f"{file} must be a whole path, such as ~/notes.md or /home/me/notes.md")
        return self


class LimitsConfig(BaseModel):
    """What one principal may use; what is unset has no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests_per_minute: int | None = Field(None, ge=1, description="requests a minute")
    tokens_per_minute: int | None = Field(None, ge=1, description="tokens computed a minute: of prompts and answers")
    calls_at_once: int | None = Field(None, ge=1, description="generations under way at once")
    waiting: int | None = Field(None, ge=1, description="of these, generations for which nothing was computed yet")
    sessions: int | None = Field(None, ge=0, description="sessions")
    session_bytes: int | None = Field(None, ge=0, description="memory that its sessions hold")
    disk_bytes: int | None = Field(None, ge=0, description="disk that its persisted sessions take")


class Config(BaseSettings):
    """What a user can set. `load` is the way to make one: it turns every fault into a ConfigError."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    model: str | None = Field(None, description="`embedded`, a folder, or a hub id; the embedded model if unset")
    host: str = Field("127.0.0.1", description="address for --http; any but loopback needs a token")
    port: int = Field(8080, ge=0, le=65535, description="port for --http; 0 takes a free one")
    token: SecretStr | None = Field(None, description="a token that --http callers may send, beside named ones")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed)] = Field(
        (), description="names that --http is called by, beside this machine's own; `*` for any"
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed)] = Field(
        (), description="origins whose pages may call --http, beside this machine's own, as https://name:port"
    )
    limits: LimitsConfig = Field(
        default_factory=lambda: LimitsConfig.model_validate({"calls_at_once": 256, "sessions": 1024}),
        description="what each principal that calls with a token may use; `mlx-mcp token add` gives one others",
    )
    window_limits: LimitsConfig = Field(
        default_factory=lambda: LimitsConfig.model_validate({}),
        description="what the callers without a token may use, all windows together",
    )
    share_prefixes: bool = Field(
        False, description="principals share cached beginnings of prompts, so that one can tell what others asked"
    )
    tls_cert: FilePath | None = Field(None, description="certificate chain for HTTPS, a PEM file")
    tls_key: FilePath | None = Field(
        None, description="its private key, a PEM file; in the file of the certificate if unset"
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed)] = Field(
        (), description="addresses or networks of proxies whose X-Forwarded headers are believed; `*` for any"
    )
    oauth_issuer: str | None = Field(None, description="authorization server whose access tokens let callers in, a URL")
    oauth_audience: str | None = Field(None, description="this server as such tokens name it, its URL from outside")
    oauth_jwks_url: str | None = Field(None, description="where its public keys are; found at the issuer if unset")
    oauth_scopes: Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed)] = Field(
        (), description="scopes that each such token must have"
    )
    request_timeout_s: float = Field(30.0, gt=0, le=3600, description="how long an HTTP request may take to arrive")
    openblas: bool = Field(True, description="put an installed OpenBLAS in front on Linux CPUs")
    max_memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="memory for all of weights, keys and values, passes and MLX's cache; on a GPU if unset: what it "
        "recommends; on a CPU if unset: no such limit",
    )
    max_weights_bytes: int | None = Field(
        None, gt=0, description="memory for weights; if unset five eighths of it, on a GPU seven eighths of the above"
    )
    max_kv_bytes: int | None = Field(
        None, gt=0, description="memory for keys and values; if unset an eighth of it, on a GPU what is left of it"
    )
    wired_bytes: int = Field(
        0,
        ge=0,
        description="memory that macOS keeps resident for the GPU; 0: none, since panics were reported",
    )
    kv_bits: int | None = Field(
        None, description="8 or 4: keep keys and values quantized; unset: as the model has them"
    )
    sampling_defaults: bool = Field(True, description="sample as a model's makers recommend where a call says nothing")
    max_running: int = Field(16, ge=1, le=512, description="generations that run at once, per model")
    max_waiting: int = Field(1024, ge=0, description="calls that may wait for a place")
    chunk_tokens: int | None = Field(
        None,
        ge=64,
        le=8192,
        multiple_of=64,
        description="prompts are split at multiples of so many tokens; unset: 128 on a CPU, 512 on a GPU",
    )
    prefill_tokens_busy: int | None = Field(
        None,
        ge=64,
        description="tokens of prompts a step while others decode; unset: 128 on a CPU, by prefill_wait_ms on a GPU",
    )
    prefill_tokens_idle: int | None = Field(
        None, ge=64, description="tokens of prompts a step while nobody does; unset: 512 on a CPU, 2048 on a GPU"
    )
    prefill_wait_ms: float = Field(
        150.0, ge=10, le=60_000, description="how long the tokens of others may wait for prompts, on a GPU"
    )
    block_tokens: int = Field(64, ge=16, le=1024, description="tokens that are cached, found and evicted together")
    shared_prefix_rows: int | None = Field(
        None, ge=0, description="calls with one beginning that share one copy of it; 0: never; unset: as measured"
    )
    shared_prefix_tokens: int = Field(512, ge=1, description="the shortest beginning that is worth sharing")
    max_sessions: int = Field(4096, ge=1, description="sessions that may be open at once, of all callers")
    session_ttl_s: float = Field(
        86400.0, gt=0, le=31_536_000, description="how long an unused session stays, if it does not say"
    )
    store_dir: Path = Field(
        default_factory=lambda: user_data_path("mlx-mcp") / "store",
        description="folder for persisted sessions and offloaded blocks; this user's alone, and one server's at a time",
    )
    max_ssd_bytes: int = Field(16 << 30, ge=0, description="what that folder may take; 0: nothing is kept on disk")
    max_offload_bytes: int = Field(
        16 << 30,
        ge=0,
        description="evicted blocks that may be written a day; 0: only what was persisted is kept",
    )
    autosave_s: float | None = Field(
        None, ge=10, description="persist every session so often, and at the end; unset: only when asked to"
    )
    max_sandbox_disk_bytes: int = Field(
        4 << 30, ge=0, description="what sandboxes on disk may take, beside that; 0: they are kept in memory only"
    )
    sandbox_autosave_s: float = Field(
        300.0, ge=0, description="how often a changed sandbox is saved that has more than 16 MiB; a smaller one at once"
    )
    sandbox_python: Literal["monty", "cpython"] = Field(
        "monty",
        description="what runs programs of sandboxes; cpython has installed packages, needs mlx-mcp[cpython], and runs "
        "only within bubblewrap or Seatbelt",
    )
    persisted_ttl_s: float = Field(
        30 * 86400.0, gt=0, le=315_360_000, description="how long an unused persisted session stays, if it does not say"
    )
    max_wait_s: float = Field(300.0, gt=0, description="how long a call may wait for memory")
    model_turn_s: float = Field(
        10.0, ge=0, le=86400, description="how long a model still takes calls while another waits for its room"
    )
    model_ttl_s: float | None = Field(
        None,
        gt=0,
        le=31_536_000,
        description="how long a model stays without a call; unset: while there is room",
    )
    models: dict[str, ModelConfig] = Field({}, description="settings of single models, by name")
    model_defaults: ModelDefaults = Field(
        default_factory=lambda: ModelDefaults.model_validate({}), description="the same for models without their own"
    )
    warm: tuple[WarmConfig, ...] = Field((), description="contexts that are there as sessions from the beginning")
    fetch_stall_s: float = Field(60.0, gt=0, le=3600, description="how long a download may make no progress")
    file_roots: Annotated[tuple[DirectoryPath, ...] | None, NoDecode, BeforeValidator(folders)] = Field(
        None, description="folders callers may have files read from; the project's over stdio, none over HTTP if unset"
    )
    max_file_bytes: int = Field(1 << 20, ge=1, description="the longest file that is read for a caller")
    max_files_bytes: int = Field(4 << 20, ge=1, description="all files of one call together")
    max_sandbox_files_bytes: int = Field(64 << 20, ge=1, description="all files that a program in a sandbox is given")
    max_request_bytes: int = Field(4 << 20, ge=1024, description="the longest message taken from a client")
    engine_idle_s: float = Field(
        1800.0, gt=0, le=31536000, description="how long the engine process lives on without anything to do"
    )
    engine_silence_s: float = Field(
        30.0, ge=5, le=3600, description="how long the engine process may show no life before its calls are given up"
    )
    step_timeout_s: float = Field(
        600.0, ge=10, le=86400, description="how long one step may take before the engine counts as hung and is ended"
    )
    ready_step_s: float = Field(
        30.0, gt=0, le=86400, description="how long one step may take before /health/ready says that the server is slow"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="what is written to the log")
    log_format: Literal["text", "json"] = Field("text", description="lines of key=value, or of JSON")
    log_file: Path | None = Field(
        None, description="where a server's log goes; unset: stderr, or engine.log in the engine's folder"
    )
    max_log_bytes: int = Field(
        10 << 20, ge=4096, description="a log file this long is renamed; the three latest of those are kept"
    )
    traces: bool = Field(False, description="send traces where OTEL_* variables say; needs mlx-mcp[otel]")
    wait_s: float | None = Field(
        None, ge=0, le=86_400, description="when a call is answered with a handle if it still runs; unset: by the host"
    )
    result_ttl_s: float = Field(3600.0, gt=0, le=86400, description="how long the result of such a call is kept")
    keep_awake: bool | None = Field(
        None, description="whether a Mac is kept from sleeping while calls run; unset: yes; elsewhere nothing is done"
    )
    shutdown_timeout_s: float = Field(5.0, ge=0, le=300, description="how long running calls may take to end at exit")

    @property
    def sandbox_dir(self) -> Path:
        """The folder of sandboxes on disk."""
        return self.store_dir / "sandboxes"

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` in config.toml for a number, which would pass for 1."""
        if isinstance(value, bool) and info.field_name not in FLAGS:
            raise ValueError(f"it cannot be {str(value).lower()}")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what no Host header could ever be."""
        for host in value:
            if not re.fullmatch(r"[^/@\s]+", host):
                raise ValueError(f"{host!r} is no name of a host, such as studio.local")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what no Origin header could ever be."""
        for origin in value:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/@\s]+/?", origin, re.IGNORECASE):
                raise ValueError(f"{origin!r} is no origin, such as https://name or http://name:8080")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line (given as arguments), then environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_path())

    @property
    def file_limits(self) -> tuple[int, int, int]:
        """The longest file that is read for a caller, all files of a prompt, and all files of a program, in bytes."""
        return self.max_file_bytes, self.max_files_bytes, self.max_sandbox_files_bytes

    @classmethod
    def load(cls, **given: Any) -> Config:
        """The settings in force; an argument that is None counts as not given.

        Raises:
            ConfigError: a value is out of range, the file is broken, or a setting is unknown, with its name.
        """
        refuse_unknown(name for name, value in os.environ.items() if value)
        try:
            config = cls(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
            if unknown:
                told = "; ".join(no_setting(".".join(map(str, at)), known_beside(at), str(at[-1])) for at in unknown)
                raise ConfigError(f"{config_path()}: {told}") from error
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(
                f"Bad settings: {faults}. Correct the flag, the variable MLX_MCP_… or {config_path()}."
            ) from error
        except (SettingsError, ValueError, OSError) as error:
            raise ConfigError(f"The settings in {config_path()} cannot be read: {error}. Correct that file.") from error
        if config.kv_bits not in (None, 4, 8):
            raise ConfigError(f"kv_bits is {config.kv_bits}; it must be 8 or 4, or unset for full precision.")
        chunk_tokens = config.chunk_tokens or 128  # a GPU's are a multiple of it
        if chunk_tokens % config.block_tokens:
            raise ConfigError(
                f"chunk_tokens ({chunk_tokens}) must be a multiple of block_tokens ({config.block_tokens})."
            )
        budgets = {"prefill_tokens_busy": config.prefill_tokens_busy, "prefill_tokens_idle": config.prefill_tokens_idle}
        for name, tokens in budgets.items():
            if tokens is not None and tokens < chunk_tokens:
                raise ConfigError(f"{name} ({tokens}) must be at least chunk_tokens ({chunk_tokens}).")
        if config.token is not None and not config.token.get_secret_value().isascii():
            raise ConfigError("MLX_MCP_TOKEN must be ASCII: HTTP headers carry nothing else reliably.")
        check_serving(config)
        return config


def check_serving(config: Config) -> None:
    """Check that the settings for HTTP work together.

    Raises:
        ConfigError: they do not.
    """
    if config.tls_key is not None and config.tls_cert is None:
        raise ConfigError(
            "tls_key is set and tls_cert is not: set both, or only tls_cert where its file has the key too."
        )
    if (config.oauth_issuer is None) != (config.oauth_audience is None):
        raise ConfigError(
            "oauth_issuer and oauth_audience belong together: set both, or unset both. The audience is what tokens "
            "name this server by, so that one for another server lets nobody in here."
        )
    for name in ("oauth_issuer", "oauth_audience", "oauth_jwks_url"):
        url = urlsplit(getattr(config, name) or "https://x")
        if url.scheme not in ("http", "https") or not url.hostname or url.fragment:
            raise ConfigError(f"{name} must be a URL, as https://auth.example.com; it is {getattr(config, name)!r}.")
        if url.scheme == "http" and url.hostname not in LOOPBACK and name != "oauth_audience":
            raise ConfigError(f"{name} must be an https URL: keys that come over http could be anybody's.")


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuse what begins like a setting in the environment and is none: a typo must not leave a default in force.

    Raises:
        ConfigError: with the names that were probably meant.
    """
    known = {PREFIX + name.upper() for name in Config.model_fields} | PLACES
    begin = (name for name in names if name.upper().startswith(PREFIX))
    unknown = sorted(name for name in begin if name.upper() not in known | FOR_TESTS)
    if unknown:
        raise ConfigError("; ".join(no_setting(name, known) for name in unknown))


def known_beside(at: tuple[int | str, ...]) -> Iterable[str]:
    """The settings that there are where an unknown one stands."""
    if len(at) == 1:
        return Config.model_fields
    tables: dict[int | str, type[BaseModel]] = {
        "models": ModelConfig,
        "warm": WarmConfig,
        "limits": LimitsConfig,
        "window_limits": LimitsConfig,
    }
    return tables.get(at[0], ModelDefaults).model_fields


def no_setting(name: str, known: Iterable[str], said: str = "") -> str:
    """That there is no such setting, and which one was probably meant by what was `said`."""
    plain = {known_name.removeprefix(PREFIX).lower(): known_name for known_name in sorted(known)}
    near = nearest((said or name).lower().removeprefix(PREFIX.lower()), plain)
    if near:
        return f"{name} is no setting; did you mean {plain[near]}?"
    return f"{name} is no setting. There are: {', '.join(plain.values())}."


def config_path() -> Path:
    """Where config.toml is looked for: MLX_MCP_CONFIG, else the user's configuration folder."""
    return Path(os.environ.get("MLX_MCP_CONFIG") or user_config_path("mlx-mcp") / "config.toml")


def available_memory_bytes() -> int:
    """The machine's memory; on Apple silicon the GPU shares it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
