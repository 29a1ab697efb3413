"""Finds every error's text in the sources, and every string of the tests, so that the two can be compared.

Sources are parsed and not run. A text is found where an error is made: in a call of one of MAKERS, in what follows
`raise`, and in the value of "error" in an answer. Names, constants and the package's own small functions are followed
to the literals that they stand for; what only a run could tell is a GAP in the text.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

from mlx_mcp import errors

ROOT = Path(__file__).parent.parent
GAP = "\0"
FIELD = re.compile(r"\{\w*[^}]*\}")  # of str.format
RUN = 3  # so many words in a row tell a text from others
MOST = 64  # forms of one text

# Errors of ours whose text is their argument; the others make a text around theirs, which is looked at by itself.
TREE = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
OURS = {name for name, kind in TREE.items() if "__init__" not in vars(kind)} | {"TooLong"}
# Makers of texts that stand by themselves: errors of the protocols, and answers that refuse.
PROTOCOL = set(
    "ToolError MCPError ResourceError ResourceNotFoundError PlainTextResponse BadLine".split()
    + "protocol_error failure _failure fail".split()
)
# Makers of a part of a text: what they are given stands in a sentence of another error, which names the next step.
PARTS = {
    **dict.fromkeys(TREE.keys() - OURS, "`errors.py` makes a text around it"),
    "ValueError": "pydantic, the tools and the settings say where it is and what to do",
    "BrokenText": "`Registration.edited` says where it is and what to do",
    "UnfitText": "`Registration.edited` says where it is and what to do",
    "broken": "makes a BrokenText",
    "not_quantizable": "says what to do",
    "storage_error": "adds a remedy for each error of the system",
    "unreadable": "adds what to do",
    "refused": "raises an error that is already made",
}
# What is raised and leaves the package as no error, and why.
INSIDE = {
    "More": "a reader asks for more text",
    "WrongCall": "a program's mistake: `HostCalls.answer` says how the function is called",
    "Refused": "raised in a program, whose author is told of it",
    "CannotReplay": "why a state cannot be rebuilt: `loaded` says it in an OtherInterpreter",
    "Submitted": "a program has given its value",
    "Malformed": "a note on an answer, not an error: what the model wrote is returned as text; of a sandbox's process: "
    "it is ended, and the run says so",
    "Unsound": "a damaged file is a miss and a counter; commands that read one say so in a text of their own",
    "CutOff": "a download goes on by itself, or ends in a text of its own",
    "Abandoned": "nobody waits for it",
    "Stop": "ends the work of a model that writes programs; the answer says why",
    "Asking": "a question to the user",
    "Exit": "an exit status; what is said before it is a note",
    "AssertionError": "a bug of ours",
    "BrokenPipeError": "caught where it is raised",
    "OSError": "becomes a StorageError by `storage_error`",
    "Overdue": "caught by the caller, which says what to do",
    "next": "one branch's error, which is made elsewhere",
    "Failed": "of `text_processes`: caught by the caller; the engine's holds an error that is made elsewhere",
    "TemplateError": "raised for a template in its own process; `chat_template` says what to do",
    "TypeError": "of a program's `print` in CPython; its author is told of it",
    "PicklingError": "caught where variables of a program are pickled; one that cannot be is told by its name",
    "NotRun": "a program's error and hint, made elsewhere; tests/workflows/sandbox looks at each",
    "TooLarge": "becomes a program's ValueError, or a text in place of its value",
    "RuntimeError": "of `MontyProcess`: caught as what the interpreter's library raises; in a program, its author's",
    "SecurityError": "raised for a template in its own process; `chat_template` says what to do",
}
MAKERS = OURS | PROTOCOL | PARTS.keys()


@dataclass
class ErrorText:
    """One text, or a part of one, at one place in the sources."""

    where: str
    maker: str
    forms: list[str]  # the text as it may read, with GAPs
    literals: list[str]  # each literal in it that says something by itself
    is_part: bool = field(default=False)


class Module:
    """A source file, with what its names stand for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.within: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.within[child] = node

    @cached_property
    def constants(self) -> dict[str, list[ast.expr]]:
        return assigned(self.tree.body, deep=False)

    @cached_property
    def functions(self) -> dict[str, ast.AST]:
        return {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}

    def function_of(self, node: ast.AST) -> ast.AST | None:
        while node in self.within and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.within[node]
        return node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None


def assigned(body: Iterable[ast.AST], deep: bool = True) -> dict[str, list[ast.expr]]:
    """Names → what the statements assign to them; those within other statements too, if `deep`."""
    found: dict[str, list[ast.expr]] = {}
    for statement in body:
        for node in ast.walk(statement) if deep else [statement]:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=False))
                    for one, value in pairs:
                        if isinstance(one, ast.Name):
                            found.setdefault(one.id, []).append(value)
    return found


class Package:
    """All sources, and the texts of errors in them."""

    def __init__(self, folder: Path) -> None:
        # What runs in a sandbox alone raises what Python raises there.
        paths = [path for path in folder.rglob("*.py") if path.parts[-3:-1] != ("sandbox", "inside")]
        self.modules = [Module(path) for path in sorted(paths)]
        self.constants: dict[str, list[ast.expr]] = {}
        for module in self.modules:
            for name, values in module.constants.items():
                if name.isupper():
                    self.constants.setdefault(name, []).extend(values)

    def unknown(self) -> list[str]:
        """What is raised and neither made by one of MAKERS nor INSIDE."""
        found = []
        for module in self.modules:
            for node in ast.walk(module.tree):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                name = called(node.exc)
                if name not in MAKERS | INSIDE.keys() | module.functions.keys() and name not in self._own_functions:
                    found.append(f"{place(module, node)}: {name}")
        return found

    @cached_property
    def _own_functions(self) -> set[str]:
        return {name for module in self.modules for name in module.functions}

    def texts(self) -> list[ErrorText]:
        """Every text of an error, in the order of the sources."""
        found = []
        for module in self.modules:
            for node in ast.walk(module.tree):
                for maker, given in self._makings(module, node):
                    forms, literals = self._read(module, node, given)
                    if literals:
                        found.append(ErrorText(place(module, node), maker, forms, literals, maker in PARTS))
        return found

    def _makings(self, module: Module, node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
        if isinstance(node, ast.Assign) and ast.unparse(node).startswith("TOLD = b"):
            yield "TOLD", node.value  # a whole answer of bytes, which no call makes
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "error":
                    yield "error", value
        if not isinstance(node, ast.Call):
            return
        name = called(node)
        if name == "__init__" and module.path.name == "errors.py":
            name = "its class"
        elif name == "Failed" or name not in MAKERS:
            return
        for given in [*node.args, *(keyword.value for keyword in node.keywords)]:
            yield name, given

    def _read(self, module: Module, at: ast.AST, given: ast.expr) -> tuple[list[str], list[str]]:
        literals: list[str] = []
        forms = self._forms(module, module.function_of(at), given, literals, ())
        told = [literal for literal in dict.fromkeys(literals) if has_words(literal)]
        return list(dict.fromkeys(forms)), told or [literal for literal in literals if words(literal)]

    def _forms(
        self, module: Module, scope: ast.AST | None, node: ast.expr, literals: list[str], seen: tuple[ast.AST, ...]
    ) -> list[str]:
        """How an expression may read; what is literal in it is added to the literals."""
        if node in seen or len(seen) > 12:
            return [GAP]
        seen = (*seen, node)

        def forms_of(child: ast.expr, within: ast.AST | None = scope, where: Module = module) -> list[str]:
            return self._forms(where, within, child, literals, seen)

        if isinstance(node, ast.Constant):
            if not isinstance(node.value, str | bytes):
                return [GAP]
            text = node.value if isinstance(node.value, str) else node.value.decode(errors="replace")
            literals.append(text)
            return [text]
        if isinstance(node, ast.JoinedStr):
            told = "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
            literals.append(told)
            parts = [
                [str(part.value)] if isinstance(part, ast.Constant) else forms_of(part.value)  # type: ignore[attr-defined]
                for part in node.values
            ]
            return joined(parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return joined([forms_of(node.left), forms_of(node.right)])
        if isinstance(node, ast.IfExp):
            return [*forms_of(node.body), *forms_of(node.orelse)]
        if isinstance(node, ast.BoolOp):
            *others, last = node.values
            return [form for value in others for form in forms_of(value) if form] + forms_of(last)
        if isinstance(node, ast.Name):
            local = assigned([scope]).get(node.id, []) if scope is not None else []
            if not local and not node.id.isupper():
                return [GAP]  # a parameter, or a module's variable
            values = local or module.constants.get(node.id, []) or self.constants.get(node.id, [])
            scope = scope if local else None
            return [form for value in values for form in forms_of(value, scope)] or [GAP]
        if isinstance(node, ast.Attribute) and node.attr.isupper():
            return [form for value in self.constants.get(node.attr, []) for form in forms_of(value, None)] or [GAP]
        if isinstance(node, ast.Dict):
            return [form for value in node.values for form in forms_of(value)]
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            return forms_of(node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                return [form for each in [node.func.value, *node.args[1:]] for form in forms_of(each)]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "encode", "strip", "capitalize"):
                own: list[str] = []
                filled = [FIELD.sub(GAP, form) for form in self._forms(module, scope, node.func.value, own, seen)]
                literals += [FIELD.sub(GAP, literal) for literal in own]
                return filled
            function = module.functions.get(called(node))
            if function is not None and called(node) not in MAKERS:
                returned = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
                return [form for value in returned for form in forms_of(value, function)] or [GAP]
        return [GAP]


def joined(parts: list[list[str]]) -> list[str]:
    """All texts that begin with one of the first, go on with one of the second, and so on."""
    return ["".join(each) for each, _ in zip(product(*parts), range(MOST), strict=False)]


def called(node: ast.Call) -> str:
    """The last part of the name that is called."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def place(module: Module, node: ast.AST) -> str:
    """Where it stands: file and line."""
    path = module.path.relative_to(ROOT) if module.path.is_relative_to(ROOT) else module.path.name
    return f"{path}:{getattr(node, 'lineno', 0)}"


def words(text: str) -> list[list[str]]:
    """The words of a text in lower case, apart where there is a GAP."""
    return [found for part in text.split(GAP) if (found := re.findall(r"\w+", part.lower()))]


def has_words(text: str) -> bool:
    """Whether a text has a run of words by which it can be known."""
    return any(len(part) >= RUN for part in words(text))


def runs(text: str) -> set[tuple[str, ...]]:
    """The runs of words by which a text can be known; all of its words if it is shorter."""
    found = {tuple(part[i : i + RUN]) for part in words(text) for i in range(len(part) - RUN + 1)}
    return found or {tuple(part) for part in words(text)}


def strings_of_tests(folder: Path, but: Iterable[str]) -> Iterator[str]:
    """The strings in the tests, without docstrings. Files and folders can be left out by name."""
    for path in sorted(folder.rglob("*.py")):
        if {*path.relative_to(folder).parts} & {*but}:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in alone:
                yield node.value if isinstance(node.value, str) else node.value.decode(errors="replace")
