"""The variables of a CPython child as bytes: what outlives a run, and what cannot.

They are pickled by cloudpickle, which takes functions and classes of the program too. Only a child ever reads them.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import cloudpickle

_Cached = functools._lru_cache_wrapper
_OF_MODULES = frozenset(("__name__", "__doc__", "__package__", "__loader__", "__spec__", "__builtins__"))


def new_namespace() -> dict[str, Any]:
    """The variables of programs, none yet: those of the module `__main__`, as in a script."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return vars(module)


def own(namespace: dict[str, Any]) -> dict[str, Any]:
    """What programs have defined."""
    return {name: value for name, value in namespace.items() if name not in _OF_MODULES}


def settle(namespace: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Pickle what programs have defined, and remove what cannot be: its types, by name, come with the bytes.

    Raises:
        MemoryError: there is not enough of it for a second copy.
    """
    try:
        return pickled(own(namespace)), {}
    except MemoryError:
        raise
    except Exception:  # whatever the classes of programs raise
        lost = {name: type(value).__name__ for name, value in own(namespace).items() if not _survives(value)}
    for name in lost:
        del namespace[name]
    return pickled(own(namespace)), lost


def restore(namespace: dict[str, Any], state: bytes) -> None:
    """Put pickled variables into a namespace.

    Raises:
        Exception: whatever their classes raise, and unpickling.
    """
    namespace.update(pickle.loads(state))


def pickled(value: Any) -> bytes:
    """A value as bytes.

    Raises:
        Exception: it cannot be pickled.
    """
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.getvalue()


def _survives(value: Any) -> bool:
    try:
        pickled(value)
    except MemoryError:
        raise
    except Exception:  # whatever the classes of programs raise
        return False
    return True


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves the variables out of functions that use them: a function finds those of the child that unpickles it.

    What would be pickled as a name of the program's is refused or taken apart: no other child has that name.
    """

    def reducer_override(self, value: Any) -> Any:
        """How a value is pickled, where that is not as usual."""
        if type(value) is functools.cached_property:  # until Python 3.12 it has a lock
            return functools.cached_property, (value.func,), {"attrname": value.attrname}
        reduced = super().reducer_override(value)
        is_usual = type(value) in self.dispatch_table or getattr(value, "__module__", None) != "__main__"
        if reduced is not NotImplemented or is_usual:
            return reduced
        if isinstance(value, _Cached):
            return cached, (value.__wrapped__, value.cache_parameters())
        reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(reduced, str):
            raise pickle.PicklingError(f"{reduced} is a name alone")
        return reduced

    def _dynamic_function_reduce(self, function: types.FunctionType) -> Any:
        reduced = super()._dynamic_function_reduce(function)
        if function.__globals__ is not vars(sys.modules["__main__"]):
            return reduced
        _, (code, _, name, defaults, closure), (attributes, slots), *rest = reduced
        slots["__globals__"] = {}
        return own_function, (code, name, defaults, closure), (attributes, slots), *rest


def cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    """A function as `functools.lru_cache` makes it, which has computed nothing yet."""
    made: Callable[..., Any] = functools.lru_cache(**parameters)(function)
    return made


def own_function(code: types.CodeType, name: str | None, defaults: Any, closure: Any) -> Callable[..., Any]:
    """A function of the programs of this child."""
    return types.FunctionType(code, vars(sys.modules["__main__"]), name, defaults, closure)
