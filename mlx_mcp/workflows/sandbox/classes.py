"""Rewrites classes and exceptions: inheritance, method decorators, exceptions and enumerations of one's own.

The interpreter has classes with methods and attributes, and no more. A class that inherits is given what it does not
define itself; which classes it comes from is kept in the class as `_lineage`, for `isinstance` and `except`. What a
class has is known from its program (`Known.classes`). An exception of one's own is an object of such a class: what is
raised is an exception of the built-in type that it comes from, which stands for the object, and `except` gives the
object back.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.workflows.sandbox.runtime import ProgramError

MARKERS = frozenset(
    "ABC ABCMeta abstractmethod Protocol Generic NamedTuple TypedDict Enum IntEnum StrEnum auto unique property "
    "staticmethod classmethod cached_property override final".split()
)
NO_BASES = frozenset("object ABC Protocol Generic".split())
ENUMS = frozenset("Enum IntEnum StrEnum".split())
EXCEPTIONS = frozenset(
    "BaseException Exception ArithmeticError LookupError RuntimeError ValueError TypeError KeyError IndexError OSError "
    "AttributeError NameError NotImplementedError TimeoutError PermissionError FileNotFoundError AssertionError "
    "StopIteration ZeroDivisionError OverflowError".split()
)
DECORATORS = {"staticmethod": "static", "classmethod": "class", "property": "property", "cached_property": "property"}
DROPPED = frozenset("abstractmethod override final unique total_ordering runtime_checkable".split())
# Methods of built-in values, which the interpreter can call but not pass on.
METHODS = frozenset(
    "get index count append add items keys values pop lower upper strip lstrip rstrip title split splitlines "
    "startswith endswith isdigit isalpha isupper islower isspace format join find replace casefold search match "
    "findall group sub".split()
)
# Methods that the interpreter never calls, so that a class would silently not do what it says.
IGNORED = frozenset("__bool__ __getattr__ __getattribute__ __setattr__ __new__ __format__ __del__ __delitem__".split())


class NotRun(Exception):
    """A program that cannot be run; nothing of it was."""

    def __init__(self, error: ProgramError) -> None:
        """`error` is what its author is told."""
        self.error = error
        super().__init__(error.message)


@dataclass
class Known:
    """What programs of one sandbox have said that later ones build on. As JSON has it."""

    modules: dict[str, str] = field(default_factory=dict)  # name in the program → module
    # Name → "members": all names that it has, "bases", "error": the built-in exception that it comes from, or "",
    # "kinds": members that are no methods → "static", "class" or "property", "fields": a dataclass's, as source.
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)


def template(text: str, **parts: ast.expr) -> ast.expr:
    """An expression in which single capital letters stand for other expressions."""

    class Filling(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> Any:
            return parts.get(node.id, node)

    filled: ast.expr = Filling().visit(ast.parse(text, mode="eval").body)
    return filled


class ClassRewriting(ast.NodeTransformer):
    """The part of a program's rewriting that is about classes and exceptions."""

    def __init__(self, tree: ast.Module, known: Known) -> None:
        """`known` is added to."""
        self.used: set[str] = set()
        self.known = known
        self._class = ""  # the one whose body is visited
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self._learn(node)
        classes = known.classes.values()
        self._kinds = {name for each in classes for name in each["kinds"]}
        called = {name for each in classes for name, kind in each["kinds"].items() if kind != "property"}
        self.properties = self._kinds - called
        self._has_errors = any(each["error"] for each in classes)
        self._has_bases = any(each["bases"] for each in classes)
        self._has_len = any("__len__" in each["members"] for each in classes) or "_Enumeration" in known.classes

    def part(self, name: str) -> ast.Name:
        """A name of the prelude, which is then there."""
        self.used.add(name)
        return ast.Name(name, ast.Load())

    def _learn(self, node: ast.ClassDef) -> None:
        """Note what a class has, with what it has from others."""
        bases = [name for base in node.bases if (name := _last(base)) not in NO_BASES and name not in MARKERS]
        members: dict[str, None] = {}
        kinds: dict[str, str] = {}
        fields: list[str] = []
        error = next((name for name in bases if name in EXCEPTIONS), "")
        for name in reversed(bases):
            above = self.known.classes.get(name, _NOTHING)
            members |= dict.fromkeys(above["members"])
            kinds |= above["kinds"]
            fields += above["fields"]
            error = error or above["error"]
        for each in node.body:
            for name in _defined(each):
                members[name] = None
                kinds.pop(name, None)
            if isinstance(each, ast.FunctionDef):
                words = [_last(decorator) for decorator in each.decorator_list]
                kinds.update((each.name, DECORATORS[word]) for word in words if word in DECORATORS)
            if isinstance(each, ast.AnnAssign):
                fields.append(ast.unparse(each))
        self.known.classes[node.name] = {
            **{"members": list(members), "kinds": kinds, "fields": fields, "error": error},
            "bases": [name for name in bases if name not in EXCEPTIONS],
        }

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        """A class of methods and attributes, and after it what it inherits."""
        marks = {_last(base) for base in node.bases}
        if "NamedTuple" in marks:
            return self._named_tuple(node)
        if "TypedDict" in marks:
            made = ast.Assign([ast.Name(node.name, ast.Store())], ast.Name("dict", ast.Load()))
            return ast.copy_location(made, node)
        if marks & ENUMS:
            return self._enumeration(node)
        known = self.known.classes[node.name]
        for base in node.bases:
            name = _last(base)
            if name not in NO_BASES | EXCEPTIONS and name not in self.known.classes:
                raise _not_run(
                    f"class {node.name} inherits from {name}",
                    node,
                    f"Keep a {name} in an attribute of the class, and write the methods that you need.",
                )
        own = {name for each in node.body for name in _defined(each)}
        for name in sorted(own & IGNORED):
            raise _not_run(
                f"class {node.name} defines {name}", node, "Write an ordinary method, and call it by its name."
            )
        node.bases, node.keywords = [], []
        outer, self._class = self._class, node.name
        node.body = [self._member(each) for each in node.body]
        self._class = outer
        node.decorator_list = [self.visit(each) for each in node.decorator_list if _last(each) not in DROPPED]
        if any(_last(each) == "dataclass" for each in node.decorator_list):
            inherited = known["fields"][: len(known["fields"]) - sum(isinstance(e, ast.AnnAssign) for e in node.body)]
            node.body = [*(ast.parse(each).body[0] for each in inherited), *node.body]
            own |= {name for each in node.body for name in _defined(each)}
        if known["error"] and "__init__" not in known["members"]:
            node.body += ast.parse("def __init__(self, *args):\n self.args = args").body
        if known["error"] and "__str__" not in known["members"]:
            self.part("_said")
            node.body += ast.parse("def __str__(self):\n return _said(self)").body
        after = self._after(node.name, known, own)
        return [ast.copy_location(each, node) for each in (node, *after)]

    def _after(self, name: str, known: dict[str, Any], own: set[str]) -> list[ast.stmt]:
        """What is set in a class after its definition: what it inherits, where it comes from, which members differ."""
        text = []
        for member in known["members"]:
            base = next((each for each in known["bases"] if member in self._members(each)), None)
            if member not in own and base is not None:
                text.append(f"{name}.{member} = {base}.{member}")
        if known["bases"]:
            lineage = " + ".join(f"({each},) + getattr({each}, '_lineage', ())" for each in known["bases"])
            text.append(f"{name}._lineage = {lineage}")
        if known["error"]:
            text.append(f"{name}._error = {known['error']}")
        if known["kinds"]:
            text.append(f"{name}._kinds = {known['kinds']!r}")
        return ast.parse("\n".join(text)).body

    def _members(self, name: str) -> list[str]:
        members: list[str] = self.known.classes.get(name, _NOTHING)["members"]
        return members

    def _member(self, node: ast.stmt) -> Any:
        if isinstance(node, ast.ClassDef):
            raise _not_run(f"class {node.name} is defined within a class", node, "Define it before the other class.")
        if isinstance(node, ast.FunctionDef):
            for each in node.decorator_list:
                if _last(each) in ("setter", "deleter"):
                    raise _not_run(f"{node.name} has a setter", node, f"Write a method set_{node.name}, and call it.")
                if _last(each) in ("staticmethod", "classmethod") and node.name in METHODS:
                    hint = "Give it another name, for instance from_text or make."
                    raise _not_run(f"{node.name} is a method of built-in values too", node, hint)
            node.decorator_list = [e for e in node.decorator_list if _last(e) not in DROPPED | DECORATORS.keys()]
        return self.visit(node)

    def _named_tuple(self, node: ast.ClassDef) -> Any:
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        if any(isinstance(each, ast.FunctionDef) for each in node.body):
            raise _not_run(f"NamedTuple {node.name} has methods", node, "Use @dataclass, or write functions beside it.")
        names = " ".join(each.target.id for each in fields if isinstance(each.target, ast.Name))
        defaults = ast.List([self.visit(each.value) for each in fields if each.value is not None], ast.Load())
        made = template(f"_namedtuple({node.name!r}, {names!r}, defaults=D)", D=defaults)
        brought = ast.parse("from collections import namedtuple as _namedtuple").body[0]
        assigned = ast.Assign([ast.Name(node.name, ast.Store())], made)
        return [ast.copy_location(brought, node), ast.copy_location(assigned, node)]

    def _enumeration(self, node: ast.ClassDef) -> Any:
        names, values = [], []
        for each in node.body:
            if isinstance(each, ast.FunctionDef):
                raise _not_run(f"Enum {node.name} has methods", node, "Write functions beside it.")
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                names.append(each.targets[0].id)
                automatic = isinstance(each.value, ast.Call) and _last(each.value.func) == "auto"
                values.append(ast.Constant(len(names)) if automatic else self.visit(each.value))
        self.known.classes.setdefault("_Enumeration", _NOTHING)
        self._has_len = True
        given = ast.Dict([ast.Constant(name) for name in names], values)
        plain = ast.Constant("str" in {_last(base) for base in node.bases} or _last(node.bases[-1]) != "Enum")
        made = template(f"F({node.name!r}, G, P)", F=self.part("_Enumeration"), G=given, P=plain)
        return ast.copy_location(ast.Assign([ast.Name(node.name, ast.Store())], made), node)

    # -- what classes are used by --

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        """Properties, static methods and class methods are looked up in the class."""
        self.generic_visit(node)
        if node.attr not in self._kinds or not isinstance(node.ctx, ast.Load):
            return node
        name = ast.Constant(node.attr)
        return ast.copy_location(template("F(V, N)", F=self.part("_member"), V=node.value, N=name), node)

    def called(self, node: ast.Call) -> ast.Call:
        """A call whose parts are rewritten; of functions that must know of lineage."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "isinstance" and (self._has_bases or self._has_errors):
            node.func = self.part("_isinstance")
        elif name == "issubclass" and self._has_bases:
            node.func = self.part("_issubclass")
        elif name == "len" and self._has_len:
            node.func = self.part("_len")
        elif name == "vars" and len(node.args) == 1:
            raise _not_run("vars() is not there", node, "Name the attributes that you want.")
        return self._of_super(node)

    def _of_super(self, node: ast.Call) -> ast.Call:
        """`super().name(…)` as a call of the class above."""
        func = node.func
        if (
            not isinstance(func, ast.Attribute)
            or not isinstance(func.value, ast.Call)
            or _last(func.value.func) != "super"
        ):
            return node
        known = self.known.classes.get(self._class, _NOTHING)
        base = next((each for each in known["bases"] if func.attr in self._members(each)), None)
        me = ast.Name("self", ast.Load())
        if base is not None:
            node.func = ast.Attribute(ast.Name(base, ast.Load()), func.attr, ast.Load())
            node.args = [me, *node.args]
        elif func.attr == "__init__":
            node.func = self.part("_initialized")
            node.args = [me, *node.args]
        elif func.attr == "__str__":
            node.func, node.args = self.part("_said"), [me]
        else:
            hint = "Call the method of the other class by the name of that class."
            raise _not_run(f"super() has no {func.attr} here", node, hint)
        return node

    def visit_Raise(self, node: ast.Raise) -> Any:
        """An object of an exception class is raised by what stands for it."""
        self.generic_visit(node)
        if node.exc is not None and self._has_errors:
            node.exc = ast.copy_location(template("F(V)", F=self.part("_raised"), V=node.exc), node.exc)
            node.cause = None
        return node

    def visit_Try(self, node: ast.Try) -> Any:
        """Handlers ask whether an exception is theirs, where there are exceptions of one's own."""
        self.generic_visit(node)
        if not self._has_errors or not node.handlers:
            return node
        orelse: list[ast.stmt] = [ast.Raise()]
        for handler in reversed(node.handlers):
            kinds = handler.type or ast.Name("BaseException", ast.Load())
            caught = template("F(_caught_error, K)", F=self.part("_is_caught"), K=kinds)
            body = handler.body
            if handler.name:
                value = template("F(_caught_error)", F=self.part("_said_by"))
                body = [ast.copy_location(ast.Assign([ast.Name(handler.name, ast.Store())], value), handler), *body]
            orelse = [ast.copy_location(ast.If(caught, body, orelse), handler)]
        base = ast.Name("BaseException", ast.Load())
        node.handlers = [ast.copy_location(ast.ExceptHandler(base, "_caught_error", orelse), node.handlers[0])]
        return node


_NOTHING: dict[str, Any] = {"members": [], "kinds": {}, "fields": [], "error": "", "bases": []}


def _last(node: ast.expr) -> str:
    """`c` of the trees of `c`, `a.b.c`, `c(…)` and `c[…]`."""
    if isinstance(node, ast.Call):
        return _last(node.func)
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [each.id for each in node.targets if isinstance(each, ast.Name)]
    if isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _not_run(message: str, node: ast.stmt | ast.expr, hint: str) -> NotRun:
    return NotRun(ProgramError("NotImplementedError", message, node.lineno, hint))
