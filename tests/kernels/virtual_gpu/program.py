"""PTX as a list of instructions."""

import functools
import re
from typing import NamedTuple


class Fault(Exception):
    """What a GPU would punish, or could: an access out of bounds, a race, threads that part ways."""


class Instruction(NamedTuple):
    """`parts`: the operation, cut at its dots. `predicate`: "" or the register that enables it, `negated` or not."""

    predicate: str
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+) )?([\w.:]+) ?(.*)")
_DECLARATION = re.compile(r"\.(reg|shared|pragma)\b")


def names(operand: str) -> list[str]:
    """`{%r1, %r2}` or `%r1` as a list of registers."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _operands(text: str) -> tuple[str, ...]:
    """Cut at the commas outside of braces and brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^{]*\})(?![^\[]*\])", text) if part.strip())


class Program:
    """One kernel.

    Attributes:
        parameters: type and name of each, in order.
        threads: of a block.
        code: the instructions; labels: where in `code` each one stands.
    """

    def __init__(self, text: str) -> None:
        head, body = text[text.index(".entry") :].split(".reqntid", 1)
        self.parameters: list[tuple[str, str]] = re.findall(r"\.param \.(\w+)\b.*? (\w+_param_\d+)", head)
        self.threads = int(body.split()[0])
        body = body[body.index("{") + 1 :].split("// -- End function")[0]  # behind it stands what a debugger reads
        body = re.sub(r"//.*|(?m:^\s*\.(?:loc|file)\b.*$)", "", body)
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for statement in body.split(";"):
            self._add(" ".join(statement.split()))

    def _add(self, statement: str) -> None:
        # Braces stand around inline assembly, too; those of operands come after a word.
        while found := re.match(r"(?:(\$\w+):|[{}]) ?", statement):
            if found[1]:
                self.labels[found[1]] = len(self.code)
            statement = statement[found.end() :]
        if not statement or _DECLARATION.match(statement):
            return
        found = _INSTRUCTION.fullmatch(statement)
        if found is None:
            raise Fault(f"no instruction: {statement}")
        negated, predicate, operation, rest = found.groups()
        operands = _operands(rest)
        self.code.append(Instruction(predicate or "", bool(negated), tuple(operation.split(".")), operands, statement))


@functools.cache
def address(operand: str) -> tuple[str, int]:
    """Register ("" = none) and offset of `[%r1 + 16]`; the block's shared memory begins at 0."""
    found = re.fullmatch(r"\[ ?(%\w+|global_smem)(?: ?\+ ?(-?\w+))? ?\]", operand)
    if found is None:
        raise Fault(f"no address: {operand}")
    return found[1] if found[1].startswith("%") else "", int(found[2] or "0", 0)
