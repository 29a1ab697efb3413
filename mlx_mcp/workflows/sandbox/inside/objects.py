"""What classes, exceptions and enumerations of a program stand on (`classes.py`)."""


def _member(value, name):
    """An attribute, which may be a property, a static method or a class method."""
    kind = value if type(value).__name__ == "type" else type(value)
    known = getattr(kind, "_kinds", {}).get(name)
    if known is None:
        return getattr(value, name)
    found = getattr(kind, name)
    if known == "static":
        return found
    if known == "class":
        return lambda *args, **kwargs: found(kind, *args, **kwargs)
    return found if kind is value else found(value)


def _flat(kinds):
    return [each for kind in kinds for each in _flat(kind)] if isinstance(kinds, tuple) else [kinds]


def _isinstance(value, kinds):
    if isinstance(value, kinds):
        return True
    lineage = getattr(type(value), "_lineage", ())
    error = getattr(type(value), "_error", None)
    for each in _flat(kinds):
        if each in lineage or (error is not None and _builtin_subclass(error, each)):
            return True
    return False


def _builtin_subclass(error, kind):
    """Whether a built-in exception is of a kind, as far as exceptions of one's own come from it."""
    if error is kind or kind is BaseException or (kind is Exception and error is not BaseException):
        return True
    above = {
        KeyError: LookupError,
        IndexError: LookupError,
        FileNotFoundError: OSError,
        PermissionError: OSError,
        TimeoutError: OSError,
        NotImplementedError: RuntimeError,
        ZeroDivisionError: ArithmeticError,
        OverflowError: ArithmeticError,
    }
    return above.get(error) is kind


def _issubclass(kind, kinds):
    lineage = getattr(kind, "_lineage", ())
    return any([each is kind or each in lineage for each in _flat(kinds)])


def _len(value):
    return value.__len__() if hasattr(type(value), "__len__") else len(value)


def _initialized(value, *args):
    if hasattr(type(value), "_error"):
        value.args = args


def _said(value):
    args = getattr(value, "args", ())
    return str(args[0]) if len(args) == 1 else str(args) if args else ""


_errors = []


def _raised(value):
    """What is raised: a built-in exception as it is; for an object of an exception class, what stands for it."""
    if type(value).__name__ == "type" and hasattr(value, "_error"):
        value = value()
    if not hasattr(type(value), "_error"):
        return value
    if not hasattr(value, "args"):
        value.args = ()
    stands = type(value)._error(f"\x1e{type(value).__name__}\x1e{value}")
    _errors.append((stands, value))
    while len(_errors) > 100:
        _errors.pop(0)
    return stands


def _said_by(error):
    """The object that a raised exception stands for, or the exception."""
    for stands, value in _errors:
        if stands is error:
            return value
    return error


def _is_caught(error, kinds):
    value = _said_by(error)
    for each in _flat(kinds):
        if hasattr(each, "_error"):
            if type(value) is each or each in getattr(type(value), "_lineage", ()):
                return True
        elif isinstance(error, each):
            return True
    return False


class _EnumMember:
    def __init__(self, kind, name, value, plain):
        self._kind, self.name, self.value, self._plain = kind, name, value, plain

    def __repr__(self):
        return f"<{self._kind}.{self.name}: {self.value!r}>"

    def __str__(self):
        return str(self.value) if self._plain else f"{self._kind}.{self.name}"

    def __eq__(self, other):
        if self is other:
            return True
        return self._plain and (other.value if isinstance(other, _EnumMember) else other) == self.value

    def __hash__(self):
        return hash(self.value) if self._plain else hash(self.name)


class _Enumeration:
    """What stands for a class that is an enumeration."""

    def __init__(self, name, values, plain):
        self.__name__ = name
        self._members = []
        for each, value in values.items():
            member = _EnumMember(name, each, value, plain)
            self._members.append(member)
            setattr(self, each, member)
        self.__members__ = {each.name: each for each in self._members}

    def __iter__(self):
        return iter(self._members)

    def __len__(self):
        return len(self._members)

    def __contains__(self, value):
        return any([each is value or each.value == value for each in self._members])

    def __getitem__(self, name):
        return self.__members__[name]

    def __call__(self, value):
        for each in self._members:
            if each.value == value or each is value:
                return each
        raise ValueError(f"{value!r} is not a valid {self.__name__}")
