"""The faults that can be planted in a module: one node of its syntax tree changed, a statement left out.

Left alone is what cannot matter, or what others look after: annotations and docstrings; what an error says; what can
never be (`assert`, and the `strict=True` of a `zip`, which says the same of two lengths); and the decorators of
functions and classes (a frozen dataclass is a matter for the type checker, which refuses the assignment that it
forbids; a cache's size is one of time).
"""

import ast
import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Place = tuple[int, int, int, int]  # line, column in UTF-8 bytes, and where it ends


@dataclass(frozen=True)
class Fault:
    """A change of one place of a module."""

    module: str
    place: Place
    new: str
    source: str
    lines: range | None  # of the statement that it lies in; None where that is run when the module is imported
    key: str  # names it whatever stands above it

    @property
    def planted(self) -> str:
        """The module's text with the fault."""
        lines = self.source.encode().split(b"\n")
        line, column, last, end = self.place
        head, tail = lines[line - 1][:column], lines[last - 1][end:]
        lines[line - 1 : last] = [head + self.new.encode() + tail]
        return b"\n".join(lines).decode()

    @property
    def name(self) -> str:
        return f"{self.module}:{self.place[0]}:{self.place[1]}: {_old(self.source, self.place)} → {self.new}"

    @property
    def diff(self) -> str:
        before, after = self.source.splitlines(), self.planted.splitlines()
        return "\n".join(difflib.unified_diff(before, after, self.module, "with the fault", lineterm="", n=2))


def _old(source: str, place: Place) -> str:
    line, column, last, end = place
    node = ast.Constant(None, lineno=line, col_offset=column, end_lineno=last, end_col_offset=end)
    return " ".join((ast.get_source_segment(source, node) or "").split())


OPERATORS: dict[type[ast.AST], Any] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
    **{ast.Mod: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}


def faults_of(module: str, source: str) -> list[Fault]:
    """Every fault that can be planted in a module."""
    found: dict[tuple[Place, str], range | None] = {}
    tree = ast.parse(source)
    skipped, lines = _not_run(tree), _lines_of_statements(tree)
    for node in ast.walk(tree):
        if node not in skipped:
            found |= {change: lines.get(node) for change in _changes(node)}
    out, times, texts = [], Counter[str](), source.splitlines()
    for place, new in sorted(found):
        key = f"{module}: {texts[place[0] - 1].strip()}: {_old(source, place)} → {new}"
        times[key] += 1
        numbered = key if times[key] == 1 else f"{key} ({times[key]})"
        out.append(Fault(module, place, new, source, found[place, new], numbered))
    return out


def _lines_of_statements(tree: ast.Module) -> dict[ast.AST, range]:
    """For every node inside a function the lines of its statement, of an `if` or a loop those of its head."""
    out: dict[ast.AST, range] = {}
    waiting: list[tuple[ast.AST, range | None]] = [(statement, None) for statement in tree.body]
    while waiting:
        node, lines = waiting.pop()
        if lines is not None:
            out[node] = lines
        inside = isinstance(node, ast.FunctionDef) or (lines is not None and not isinstance(node, ast.ClassDef))
        for child in ast.iter_child_nodes(node):
            body = isinstance(node, ast.FunctionDef) and child in node.body
            if isinstance(child, ast.stmt) and (body or inside):
                first = getattr(child, "body", None)
                end = max(child.lineno, first[0].lineno - 1) if first else child.end_lineno or child.lineno
                waiting.append((child, range(child.lineno, end + 1)))
            else:
                waiting.append((child, lines))
    return out


def _not_run(tree: ast.AST) -> set[ast.AST]:
    """Annotations, docstrings and what only a type checker reads."""
    out: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            parts += [node.returns, *(one.annotation for one in arguments if one is not None)]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts += node.decorator_list
        if isinstance(node, ast.keyword) and node.arg == "strict":
            parts.append(node.value)
        if isinstance(node, ast.AnnAssign):
            parts.append(node.annotation)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            parts.append(node)
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):  # what a sentence says; what can never be
            parts += list(ast.iter_child_nodes(node))
        for part in parts:
            out |= set(ast.walk(part)) if part is not None else set()
    return out


def _changes(node: ast.AST) -> Iterator[tuple[Place, str]]:
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            ops = [*node.ops[:number], OPERATORS[type(operator)](), *node.ops[number + 1 :]]
            yield _place(node), f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield _place(node), f"({ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        yield _place(node), f"({ast.unparse(ast.BoolOp(OPERATORS[type(node.op)](), node.values))})"
    elif isinstance(node, ast.UnaryOp):
        yield _place(node), f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield _place(node), str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in NAMES:
            whole = ast.unparse(node)
            yield _place(node), whole[: len(whole) - len(name)] + NAMES[name]
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield _place(node.test), f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield _place(node), ast.unparse(ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value))
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield _place(node), "pass"


def _place(node: ast.expr | ast.stmt) -> Place:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
