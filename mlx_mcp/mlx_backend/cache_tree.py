"""Flattens the caches of a model, among which may be lists of caches, and puts them back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from mlx_lm.models.cache import CacheList


def leaves(caches: Iterable[Any]) -> list[Any]:
    """The caches, with the caches of every list among them in its place."""
    return [leaf for cache in caches for leaf in (leaves(cache.caches) if isinstance(cache, CacheList) else [cache])]


def regroup(template: Iterable[Any], flat: Iterable[Any]) -> list[Any]:
    """The flat caches, put into lists as in the template."""
    # No function inside that calls itself: such a cycle would keep the caches until the garbage is collected.
    rest, group = iter(flat), cast(Any, CacheList)
    return [group(*regroup(c.caches, rest)) if isinstance(c, CacheList) else next(rest) for c in template]
