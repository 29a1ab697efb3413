"""The tree of one program, rewritten: what `idioms.py` lists, except classes and exceptions (`classes.py`)."""

from __future__ import annotations

import ast
import copy
import re
from dataclasses import replace
from typing import Any

from mlx_mcp.workflows.sandbox import prelude
from mlx_mcp.workflows.sandbox.classes import MARKERS, METHODS, ClassRewriting, Known, NotRun, template
from mlx_mcp.workflows.sandbox.explaining import explain
from mlx_mcp.workflows.sandbox.runtime import ProgramError

# Modules that the interpreter does not have. What the prelude has of them is named in its definitions.
ABSENT = frozenset(
    "calendar concurrent.futures contextlib difflib heapq html io logging operator pprint statistics string textwrap "
    "threading traceback urllib.parse uuid".split()
)
# These it has in part, and the prelude has more of them.
MODULES = ABSENT | frozenset("collections dataclasses functools sys asyncio json re".split())
# What is imported of these stands in annotations alone, or is known by its name, or changes nothing.
SILENT = frozenset("__future__ abc collections.abc enum typing_extensions types warnings".split())
TYPING = frozenset(
    "Annotated Any Callable ClassVar Final Generic Literal Optional Protocol Tuple Type TypeVar Union Iterable "
    "Iterator Mapping Sequence Dict List Set FrozenSet Generator Never NoReturn Self TYPE_CHECKING".split()
)
TYPES = frozenset("str list dict set tuple bytes int float".split())
CLASS_METHODS = frozenset("fromkeys fromhex from_bytes maketrans".split())
# Methods that the interpreter lacks, by names that nothing else has.
LACKED_METHODS = {"isocalendar": "_isocalendar", "fromtimestamp": "_fromtimestamp", "translate": "_translate"}
# What takes a generator expression as the list that it is to the interpreter.
CONSUMERS = frozenset("sum any all list set dict tuple sorted min max frozenset enumerate Counter deque".split())
CONSUMING_METHODS = frozenset("join extend update writelines fromkeys".split())
OTHER_NAMES = {"IOError": "OSError", "EnvironmentError": "OSError", "ConnectionError": "OSError"}
OTHER_NAMES |= {"UnicodeError": "ValueError"}
FLAGS = {"S": "DOTALL", "M": "MULTILINE", "I": "IGNORECASE", "A": "ASCII", "U": "NOFLAG", "UNICODE": "NOFLAG"}
GROUP = re.compile(r"(?<!\\)((?:\\\\)*)\\([1-9])")  # `\1` in the new text of a substitution
CALLED = frozenset("map filter reduce partial defaultdict".split())  # these take a function first


class Rewriting(ClassRewriting):
    """Rewrites one program. `used` are then the names of the prelude that it needs."""

    def __init__(self, tree: ast.Module, functions: frozenset[str], known: Known) -> None:
        """`functions` are the host functions; `known` is added to."""
        super().__init__(tree, known)
        self._functions = functions
        nodes = list(ast.walk(tree))
        self._bound = {node.id for node in nodes if isinstance(node, ast.Name) and not _loaded(node)}
        self._bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        self._bound |= {node.name for node in nodes if isinstance(node, defined)}
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        self._bound |= {alias.asname or alias.name for node in imports for alias in node.names}
        # Functions that do nothing but ask the model: name → the same as a lambda.
        self._asking: dict[str, ast.Lambda | None] = {}
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                self._asking[node.name] = None if node.name in self._asking else _as_lambda(node)

    # -- names and modules --

    def visit_Import(self, node: ast.Import) -> Any:
        """Modules that are not there are names that are looked up in `visit_Attribute`."""
        kept = []
        for alias in node.names:
            if alias.name in MODULES:
                self.known.modules[alias.asname or alias.name] = alias.name
            packages = {each.partition(".")[0] for each in ABSENT if "." in each}
            if alias.name not in ABSENT | SILENT | packages:
                kept.append(alias)
        node.names = kept
        return node if kept else ast.copy_location(ast.Pass(), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        """Names of the prelude are assigned, and names that stand in annotations alone are left out."""
        module = node.module or ""
        kept: list[ast.alias] = []
        assigned: list[ast.stmt] = []
        for alias in node.names:
            name, target = f"_{module.replace('.', '_')}_{alias.name}", alias.asname or alias.name
            if f"{module}.{alias.name}" in MODULES:
                self.known.modules[target] = f"{module}.{alias.name}"
            elif name in prelude.names():
                assigned.append(ast.Assign([ast.Name(target, ast.Store())], self.part(name)))
            elif module in SILENT or alias.name in MARKERS or (module == "typing" and alias.name not in TYPING):
                continue
            elif module in ABSENT:
                raise NotRun(_lacks(module, alias.name, node.lineno))
            else:
                kept.append(alias)
        node.names = kept
        statements = [*([node] if kept else []), *assigned]
        return [ast.copy_location(each, node) for each in statements] or ast.copy_location(ast.Pass(), node)

    def visit_Name(self, node: ast.Name) -> Any:
        """Helpers are there without an import."""
        if _loaded(node) and node.id not in self._bound | self._functions:
            if node.id in prelude.HELPERS:
                self.used.add(node.id)
            node.id = OTHER_NAMES.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        """Names of modules, and methods of types as values."""
        if not _loaded(node):
            self.generic_visit(node)
            return node
        owner = _dotted(node.value)
        module = self.known.modules.get(owner)
        if module is not None:
            name = f"_{module.replace('.', '_')}_{node.attr}"
            if name in prelude.names():
                return ast.copy_location(self.part(name), node)
            if module in ABSENT and node.attr not in MARKERS:
                raise NotRun(_lacks(module, node.attr, node.lineno))
            if module == "re":
                node.attr = FLAGS.get(node.attr, node.attr)
        if (owner, node.attr) == ("str", "maketrans"):
            return ast.copy_location(self.part("_str_maketrans"), node)
        if owner in TYPES - self._bound and node.attr not in CLASS_METHODS:
            method = ast.Attribute(ast.Name("_self", ast.Load()), node.attr, ast.Load())
            return ast.copy_location(template("lambda _self, *_args: M(*_args)", M=method), node)
        return super().visit_Attribute(node)

    # -- expressions --

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> Any:
        """To the interpreter it is a list, so an iterator is made of that."""
        self.generic_visit(node)
        listed = ast.ListComp(node.elt, node.generators)
        return ast.copy_location(template("iter(L)", L=ast.copy_location(listed, node)), node)

    def visit_Call(self, node: ast.Call) -> Any:
        """Calls of what is not there, and many calls of the model at once."""
        if batch := self._batch(node):
            return self.visit(ast.copy_location(batch, node))
        func = node.func
        name = func.id if isinstance(func, ast.Name) else ""
        method = func.attr if isinstance(func, ast.Attribute) else ""
        consumed = len(node.args) == 1 and isinstance(node.args[0], ast.GeneratorExp)
        if consumed and (name in CONSUMERS or method in CONSUMING_METHODS):
            self.generic_visit(node.args[0])
            node.func = self.visit(func)
            return self.called(node)
        of_type = isinstance(func, ast.Attribute) and _dotted(func.value) in TYPES - self._bound
        if of_type and node.args and method not in CLASS_METHODS and not isinstance(node.args[0], ast.Starred):
            assert isinstance(func, ast.Attribute)
            func.value, node.args = node.args[0], node.args[1:]
        for each in node.keywords:
            if each.arg == "key":
                each.value = self._passed_on(each.value)
        if node.args and (name in CALLED or method in CALLED):
            node.args[0] = self._passed_on(node.args[0])
        if name == "show_vars" and not node.args:
            helpers = ast.Constant(" ".join(sorted(prelude.HELPERS)))
            return ast.copy_location(template("F(locals(), H.split())", F=self.part("_show_vars"), H=helpers), node)
        node = self._lacked(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in self.properties:
            # What is called is hardly a property, and a method of a built-in value can be called only by its name.
            node.func.value = self.visit(node.func.value)
            node.args = [self.visit(each) for each in node.args]
            node.keywords = [self.visit(each) for each in node.keywords]
        else:
            self.generic_visit(node)
        return self.called(node)

    def _passed_on(self, node: ast.expr) -> ast.expr:
        """A method of a built-in value that is passed on, as a function that calls it."""
        if not isinstance(node, ast.Attribute) or node.attr not in METHODS or _dotted(node.value) in TYPES:
            return node
        if _dotted(node.value) in self.known.modules:
            return node
        return ast.copy_location(template("lambda *_args: M(*_args)", M=node), node)

    def _lacked(self, node: ast.Call) -> ast.Call:
        """Methods that the interpreter lacks, or that lack an argument there."""
        func = node.func
        if not isinstance(func, ast.Attribute):
            return node
        owner = _dotted(func.value)
        if func.attr in ("sub", "subn") and len(node.args) >= 2:
            self._substituted(node, func, owner)
        elif (owner, func.attr) == ("json", "dumps") and any(each.arg == "default" for each in node.keywords):
            node.func = self.part("_json_dumps_default")
        elif (owner, func.attr) == ("sys.stdout", "write"):
            node.func = ast.Name("print", ast.Load())
            node.keywords.append(ast.keyword("end", ast.Constant("")))
        elif func.attr in LACKED_METHODS and owner not in self.known.modules:
            node.func, node.args = self.part(LACKED_METHODS[func.attr]), [func.value, *node.args]
        elif func.attr == "format_map" and len(node.args) == 1:
            func.attr, node.keywords, node.args = "format", [ast.keyword(None, node.args[0])], []
        return node

    def _substituted(self, node: ast.Call, func: ast.Attribute, owner: str) -> None:
        r"""Substitutions by a function, and `\1` before a letter, which the interpreter takes for a name."""
        of_module = self.known.modules.get(owner) == "re" or owner == "re"
        new = node.args[1 if of_module else 0]
        if func.attr == "sub" and isinstance(new, ast.Constant):
            if isinstance(new.value, str):
                new.value = GROUP.sub(r"\1\\g<\2>", new.value)
        elif of_module:
            node.func = self.part(f"_re_{func.attr}")
        else:
            node.func, node.args = self.part(f"_pattern_{func.attr}"), [func.value, *node.args]

    # -- many calls of the model at once --

    def _batch(self, node: ast.Call) -> ast.expr | None:
        """`map(llm_query, prompts)` and its like as one batch, or None."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if not self._functions - self._bound >= {"llm_query", "llm_query_batched"}:
            return None
        if method == "gather" and len(node.args) == 1 and isinstance(node.args[0], ast.Starred):
            many = node.args[0].value
            if isinstance(many, ast.ListComp | ast.GeneratorExp) and isinstance(many.elt, ast.Call):
                asked = _query(many.elt)
                return None if asked is None else _batched(asked, many.generators)
        if "map" in (name, method) and len(node.args) == 2 and "map" not in self._bound:
            function = node.args[0]
            if isinstance(function, ast.Name) and function.id != "llm_query":
                function = self._asking.get(function.id) or function
            if isinstance(function, ast.Name) and function.id == "llm_query":
                return template("iter(llm_query_batched(list(V)))", V=node.args[1])
            if isinstance(function, ast.Lambda) and len(function.args.args) == 1 and not function.args.defaults:
                asked = _query(function.body)
                if asked is not None:
                    target = ast.Name(function.args.args[0].arg, ast.Store())
                    loops = [ast.comprehension(target, node.args[1], [], 0)]
                    return template("iter(B)", B=_batched(asked, loops))
        return None

    def visit_Await(self, node: ast.Await) -> Any:
        """A host function has its value at once, and so has a batch."""
        self.generic_visit(node)
        called = node.value.func if isinstance(node.value, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in self._functions - self._bound:
            return node.value
        return node

    # -- statements --

    def visit_Delete(self, node: ast.Delete) -> Any:
        """Names become None, and items are taken out."""
        statements: list[ast.stmt] = []
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
            for each in targets:
                statements.append(ast.copy_location(self._deleted(each), node))
        return [self.visit(each) for each in statements]

    def _deleted(self, target: ast.expr) -> ast.stmt:
        if isinstance(target, ast.Subscript) and not isinstance(target.slice, ast.Slice):
            return ast.Expr(template("V.pop(K)", V=target.value, K=target.slice))
        stored = copy.copy(target)
        stored.ctx = ast.Store()  # type: ignore[attr-defined]
        return ast.Assign(
            [stored], ast.List([], ast.Load()) if isinstance(target, ast.Subscript) else ast.Constant(None)
        )

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """A generator collects its values, and returns an iterator over them."""
        yields = [each for each in _own(node) if isinstance(each, ast.Yield | ast.YieldFrom)]
        if yields:
            _collect(node)
        self.generic_visit(node)
        return node

    def visit_TypeAlias(self, node: Any) -> Any:
        """The name of the type, assigned."""
        return ast.copy_location(ast.Assign([node.name], node.value), node)


def _loaded(node: ast.Name | ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Load)


def _dotted(node: ast.expr) -> str:
    """`a.b` of the tree of `a.b`; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return ""


def _lacks(module: str, name: str, line: int) -> ProgramError:
    error = explain("ImportError", f"cannot import name '{name}' from '{module}'", line)
    start = f"_{module.replace('.', '_')}_"
    there = ", ".join(sorted(each.removeprefix(start) for each in prelude.names() if each.startswith(start)))
    return replace(error, hint=f"{error.hint} Of {module} there is: {there}." if there else error.hint)


def _query(node: ast.expr) -> ast.Call | None:
    """The call, if it is one of `llm_query` with one prompt."""
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "llm_query"
    if not named or not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return None
    return node


def _batched(asked: ast.Call, generators: list[ast.comprehension]) -> ast.Call:
    prompts = ast.ListComp(asked.args[0], generators)
    return ast.Call(ast.Name("llm_query_batched", ast.Load()), [prompts], asked.keywords)


def _as_lambda(node: ast.FunctionDef) -> ast.Lambda | None:
    """A function with one parameter that does nothing but return what it asks the model."""
    body = [each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None or len(node.args.args) != 1:
        return None
    if node.decorator_list or _query(body[0].value) is None:
        return None
    return ast.Lambda(copy.deepcopy(node.args), copy.deepcopy(body[0].value))


def _own(node: ast.AST) -> list[ast.AST]:
    """All nodes in a function, except those in functions and classes within it."""
    found = []
    for each in ast.iter_child_nodes(node):
        if not isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            found += [each, *_own(each)]
    return found


class _Collecting(ast.NodeTransformer):
    """Values that are yielded are put into `_yielded`, which is returned."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return node

    def visit_Yield(self, node: ast.Yield) -> Any:
        value = node.value or ast.Constant(None)
        return ast.copy_location(template("_yielded.append(V)", V=self.visit(value)), node)

    def visit_YieldFrom(self, node: ast.YieldFrom) -> Any:
        return ast.copy_location(template("_yielded.extend(V)", V=self.visit(node.value)), node)

    def visit_Return(self, node: ast.Return) -> Any:
        return ast.copy_location(ast.Return(template("iter(_yielded)")), node)


def _collect(node: ast.FunctionDef) -> None:
    loops = [each for each in _own(node) if isinstance(each, ast.While)]
    for loop in loops:
        endless = isinstance(loop.test, ast.Constant) and loop.test.value
        if endless and not any(isinstance(each, ast.Break | ast.Return) for each in _own(loop)):
            hint = "Give it a number of values, and end the loop there: generators are run to their end here."
            raise NotRun(ProgramError("NotImplementedError", f"{node.name}() yields without end", loop.lineno, hint))
    first = node.body[0]
    node.body = [_Collecting().visit(each) for each in node.body]
    start = ast.Assign([ast.Name("_yielded", ast.Store())], ast.List([], ast.Load()))
    end = ast.Return(template("iter(_yielded)"))
    node.body = [ast.copy_location(start, first), *node.body, ast.copy_location(end, node.body[-1])]
