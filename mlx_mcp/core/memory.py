"""Divides a device's memory between weights, passes, MLX's cache, and keys and values. Knows sizes, and no device.

    |<------------------------------ ceiling ------------------------------>|
    | weights of all models | a pass of each | MLX's cache | keys and values |

On a GPU everything has one ceiling: what is left beside the weights is for keys and values, so that their limit follows
loads and unloads. On a CPU weights, and keys and values, have a limit each, as shares of the machine's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

CEILING = 15 / 16  # of what the device recommends; the rest is for what is not counted
MIN_SHARE = 0.5  # of the ceiling, however often the engine process has died
KV_SHARE = 16  # keys and values have at least a sixteenth of the ceiling, so that a model that fits can be used
CACHE_SHARE = 16  # freed memory that MLX may keep: a sixteenth of the ceiling
MAX_CACHE_BYTES = 4 << 30
MIN_TOKENS = 512  # a model that has room for fewer tokens is not loaded
BUFFERS_PER_BLOCK = 4  # arrays of a cached block: one for each shape and kind of layer, three where it is quantized
BITS_TRIED = ((8, 8.5), (4, 4.5))  # of weights or keys and values, and what they take with scales and biases


@dataclass(frozen=True)
class DeviceMemory:
    """What a device says of its memory."""

    backend: str  # metal, cuda or cpu
    usable_bytes: int  # what one process can hold: on Metal the recommended working set
    max_buffers: int | None = None  # how many arrays a process can have at once

    @property
    def is_gpu(self) -> bool:
        """Whether running out of memory ends the process, so that there must be one ceiling."""
        return self.backend != "cpu"


@dataclass(frozen=True)
class MemorySettings:
    """What a user has set, and how much of the ceiling is taken after deaths of the engine process."""

    max_memory_bytes: int | None = None
    max_weights_bytes: int | None = None
    max_kv_bytes: int | None = None
    share: float = 1.0
    wired_bytes: int = 0


@dataclass(frozen=True)
class Budget:
    """What may take how much. Without a ceiling the limits of weights and of keys and values are fixed."""

    max_weights_bytes: int  # of all models, with the largest pass of each where there is a ceiling
    max_kv_bytes: int | None  # where a user has set it, or where there is no ceiling
    ceiling_bytes: int | None = None
    cache_bytes: int | None = None  # freed memory that MLX may keep; None: as MLX has it
    max_blocks: int | None = None  # cached blocks, whatever their size

    def kv_bytes(self, taken_bytes: int) -> int:
        """What keys and values may take beside `taken_bytes` of weights and passes."""
        if self.ceiling_bytes is None:
            assert self.max_kv_bytes is not None, "no limit at all"
            return self.max_kv_bytes
        left = max(0, self.ceiling_bytes - (self.cache_bytes or 0) - taken_bytes)
        return left if self.max_kv_bytes is None else min(left, self.max_kv_bytes)

    @property
    def words(self) -> str:
        """What was set, in one line."""
        if self.ceiling_bytes is None:
            kv = "" if self.max_kv_bytes is None else f", {gb(self.max_kv_bytes)} for keys and values"
            return f"memory: {gb(self.max_weights_bytes)} for weights{kv}"
        kv = "the rest" if self.max_kv_bytes is None else f"{gb(self.max_kv_bytes)} at most"
        return (
            f"memory: {gb(self.ceiling_bytes)} in all, of these at most {gb(self.max_weights_bytes)} for weights and "
            f"passes, {gb(self.cache_bytes or 0)} for MLX's cache, {kv} for keys and values"
        )


def fixed_budget(settings: MemorySettings, physical_bytes: int) -> Budget:
    """The limits on a CPU: together three quarters of the machine's memory."""
    return Budget(settings.max_weights_bytes or physical_bytes * 5 // 8, settings.max_kv_bytes or physical_bytes // 8)


def budget_for(settings: MemorySettings, device: DeviceMemory) -> Budget:
    """The limits on a device. A ceiling that a user sets holds on a CPU too, and never exceeds what the device has."""
    if not device.is_gpu and settings.max_memory_bytes is None:
        return fixed_budget(settings, device.usable_bytes)
    most = int(device.usable_bytes * CEILING)
    ceiling = int(min(settings.max_memory_bytes or most, most) * max(MIN_SHARE, settings.share))
    cache = min(ceiling // CACHE_SHARE, MAX_CACHE_BYTES)
    weights = ceiling - cache - ceiling // KV_SHARE
    blocks = None if device.max_buffers is None else device.max_buffers // 2 // BUFFERS_PER_BLOCK
    return Budget(min(settings.max_weights_bytes or weights, weights), settings.max_kv_bytes, ceiling, cache, blocks)


def fitting_weights(weights_bytes: int, bits: float, room_bytes: int) -> str:
    """Which quantization of weights that are too large would fit, in a sentence; none, and nothing is said."""
    for fewer, stored in BITS_TRIED:
        need = int(weights_bytes * stored / bits)
        if stored < bits and need <= room_bytes:
            return f" The same model in {fewer} bits takes about {gb(need)}, for which there is room."
    return ""


def lack_of_tokens(kv_bytes: int, token_bytes: int, row_bytes: int, kv_bits: int | None) -> str | None:
    """Why a model cannot be used beside its weights: too few tokens have room, and what would help; None if it can.

    `token_bytes` and `row_bytes` are what one more token, and a row of no tokens, take.
    """
    if token_bytes <= 0 or kv_bytes >= row_bytes + MIN_TOKENS * token_bytes:
        return None
    tokens = max(0, kv_bytes - row_bytes) // token_bytes
    helps = [
        f"kv_bits = {bits} gives room for about {int(tokens * 16 / stored)}"
        for bits, stored in BITS_TRIED
        if kv_bits is None and tokens * 16 / stored >= MIN_TOKENS
    ]
    return (
        f"beside its weights {gb(kv_bytes)} are left for keys and values, which is room for {tokens} tokens and less "
        f"than the {MIN_TOKENS} that a model needs{''.join('; ' + each for each in helps)}"
    )


def gb(num_bytes: int) -> str:
    """So many bytes in words."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
