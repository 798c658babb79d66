"""The registers of a block's threads, and the instructions that look at nothing else: an array a register."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from virtual_gpu.program import Fault, address, names
from virtual_gpu.ptx_types import BITS, TYPES, Array, from_bfloat16, immediate, size_of, to_bfloat16, to_float16

_COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
# Parts of an operation that change nothing here: rounding is to nearest, approximations are exact.
_PLAIN = {"rn", "approx", "full", "ftz", "lo", *TYPES, "pred", "bf16", "bf16x2", "f16x2", "f32x2"}


def _check_plain(parts: tuple[str, ...], *known: str) -> None:
    if not set(parts[1:]) <= _PLAIN | set(known):
        raise Fault("a form of the instruction that this machine does not know")


def _quotient(x: Array, y: Array) -> Array:
    """Integers, rounded towards zero; what a division by 0 gives is not defined."""
    divisor = np.where(y == 0, 1, y).astype(np.int64)
    wide = x.astype(np.int64)
    return np.abs(wide) // np.abs(divisor) * np.sign(wide) * np.sign(divisor)


def filling(register: str, kind: str) -> str:
    """The type that fills a register which may be wider than what is put into it."""
    if kind[0] == "f" or not register.startswith("%"):
        return kind
    width = {"%rd": 8, "%rs": 2}.get(register.rstrip("0123456789"), 4)
    return kind[0] + str(8 * max(width, size_of(kind)))


class Lanes:
    """The threads of a block; a method an instruction, with its parts, its operands and who takes part in it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._registers: dict[str, Array] = {"%tid.x": np.arange(threads, dtype=np.uint32)}

    # Operands

    def _get(self, operand: str, kind: str = "b32") -> Any:
        """A number or [threads] numbers; of "f32x2" [threads, 2]."""
        if kind == "f32x2":
            return np.ascontiguousarray(self._lanes(operand, "b64")).view(np.float32).reshape(-1, 2)
        if operand.startswith("%") or operand in self._registers:  # inline assembly names its own without a sign
            bits = self._registers[operand]
            if bits.dtype.itemsize != size_of(kind):
                raise Fault(f"{operand} has {bits.dtype.itemsize} bytes, not the {size_of(kind)} of {kind}")
            return bits.view(TYPES[kind])
        return TYPES[kind](0) if operand == "global_smem" else immediate(operand, kind)

    def _lanes(self, operand: str, kind: str = "b32") -> Array:
        return np.broadcast_to(self._get(operand, kind), (self.threads,))

    def _put(self, register: str, values: Any, kind: str = "b32", mask: Array | None = None) -> None:
        if kind == "f32x2":
            values, kind = np.ascontiguousarray(values, np.float32).view(np.uint64)[:, 0], "b64"
        lanes = np.broadcast_to(np.asarray(values).astype(TYPES[kind], copy=False), (self.threads,))
        bits = np.ascontiguousarray(lanes).view(BITS[size_of(kind)])
        if mask is not None:
            bits = np.where(mask, bits, self._old(register, bits))
        if register != "_":
            self._registers[register] = bits

    def _old(self, register: str, like: Array) -> Array:
        """What a register held; if nothing, all ones, which as a float is not a number."""
        return self._registers.get(register, np.full(self.threads, np.iinfo(like.dtype).max, like.dtype))

    def _half(self, operand: str, kind: str) -> Array:
        """Part of a pair: of some, one half is never used, and never written."""
        unwritten = operand.startswith("%") and operand not in self._registers
        return self._old(operand, np.empty(0, BITS[size_of(kind)])) if unwritten else self._lanes(operand, kind)

    def _predicate(self, operand: str) -> Array:
        return self._registers[operand] if operand[0] == "%" else np.full(self.threads, int(operand, 0) != 0)

    def _addresses(self, operand: str, wide: bool) -> Array:
        register, offset = address(operand)
        base = self._get(register, "s64" if wide else "s32").astype(np.int64) if register else 0
        return np.broadcast_to(base + np.int64(offset), (self.threads,))

    # Arithmetic

    def _two(self, function: Callable[[Any, Any], Any], parts: Any, operands: Any, mask: Array | None) -> None:
        """Of two operands, or from the left of three, as the youngest parts' maximum has them."""
        _check_plain(parts)
        kind = parts[-1]
        if kind == "pred":
            self._registers[operands[0]] = functools.reduce(
                function, [self._predicate(operand) for operand in operands[1:]]
            )
        elif kind == "bf16x2":
            pairs = [np.ascontiguousarray(self._lanes(operand)).view(np.uint16) for operand in operands[1:]]
            values = to_bfloat16(functools.reduce(function, [from_bfloat16(pair) for pair in pairs]))
            self._put(operands[0], values.view(np.uint32), "b32", mask)
        else:
            values = functools.reduce(function, [self._get(operand, kind) for operand in operands[1:]])
            self._put(operands[0], values, kind, mask)

    def _add(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(lambda x, y: x + y, parts, operands, mask)

    def _sub(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(lambda x, y: x - y, parts, operands, mask)

    def _and(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(lambda x, y: x & y, parts, operands, mask)

    def _or(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(lambda x, y: x | y, parts, operands, mask)

    def _xor(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(lambda x, y: x ^ y, parts, operands, mask)

    def _extreme(self, function: Callable[[Any, Any], Any], parts: Any, operands: Any, mask: Array | None) -> None:
        """A maximum or minimum; "relu" raises it to 0, of integers only."""
        if parts[1:] == ("relu", "s32"):
            self._two(function, (parts[0], "s32"), operands, mask)
            self._put(operands[0], np.maximum(self._get(operands[0], "s32"), 0), "s32", mask)
        else:
            self._two(function, parts, operands, mask)

    def _max(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._extreme(np.fmax if parts[-1] == "f32" else np.maximum, parts, operands, mask)

    def _min(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._extreme(np.fmin if parts[-1] == "f32" else np.minimum, parts, operands, mask)

    def _div(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two((lambda x, y: x / y) if parts[-1] == "f32" else _quotient, parts, operands, mask)

    def _rem(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(lambda x, y: x - _quotient(x, y) * y, parts, operands, mask)

    def _mul(self, parts: Any, operands: Any, mask: Array | None) -> None:
        _check_plain(parts, "wide", "hi")
        kind = parts[-1]
        if parts[1] == "wide":
            self._put(operands[0], self._product(operands, kind), kind[0] + str(8 * 2 * size_of(kind)), mask)
        elif parts[1] == "hi":
            self._put(operands[0], self._product(operands, kind) >> 8 * size_of(kind), kind, mask)
        else:
            self._two(lambda x, y: x * y, parts, operands, mask)

    def _product(self, operands: Any, kind: str) -> Any:
        """Of two numbers of up to 32 bits, whole."""
        wide = TYPES[kind[0] + str(8 * 2 * size_of(kind))]
        return np.asarray(self._get(operands[1], kind)).astype(wide) * np.asarray(self._get(operands[2], kind)).astype(
            wide
        )

    def _mad(self, parts: Any, operands: Any, mask: Array | None) -> None:
        _check_plain(parts, "wide")
        kind = parts[-1]
        if parts[1] == "wide":
            wide = kind[0] + str(8 * 2 * size_of(kind))
            self._put(operands[0], self._product(operands, kind) + self._get(operands[3], wide), wide, mask)
        else:
            x, y, z = (self._get(operand, kind) for operand in operands[1:])
            self._put(operands[0], x * y + z, kind, mask)

    def _fma(self, parts: Any, operands: Any, mask: Array | None) -> None:
        _check_plain(parts)
        if parts[-1] == "bf16":  # of two such numbers and a float32
            if parts != ("fma", "rn", "f32", "bf16"):
                raise Fault("a form of the instruction that this machine does not know")
            x, y = (from_bfloat16(self._lanes(operand, "b16")).astype(np.float64) for operand in operands[1:3])
            self._put(operands[0], x * y + self._get(operands[3], "f32"), "f32", mask)
            return
        x, y, z = (np.asarray(self._get(operand, parts[-1])).astype(np.float64) for operand in operands[1:])
        self._put(operands[0], x * y + z, parts[-1], mask)

    def _one(self, function: Callable[[Any], Any], parts: Any, operands: Any, mask: Array | None) -> None:
        _check_plain(parts)
        self._put(operands[0], function(self._get(operands[1], parts[-1])), parts[-1], mask)

    def _neg(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._one(lambda x: -x, parts, operands, mask)

    def _abs(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._one(np.abs, parts, operands, mask)

    def _ex2(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._one(np.exp2, parts, operands, mask)

    def _lg2(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._one(np.log2, parts, operands, mask)

    def _rcp(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._one(lambda x: 1 / x, parts, operands, mask)

    def _not(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if parts[-1] == "pred":
            self._registers[operands[0]] = ~self._predicate(operands[1])
        else:
            self._one(lambda x: ~x, parts, operands, mask)

    def _shl(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, by = parts[-1], self._lanes(operands[2], "u32")
        bits = 8 * size_of(kind)
        shifted = self._lanes(operands[1], kind) << np.minimum(by, bits - 1).astype(TYPES[kind])
        self._put(operands[0], np.where(by < bits, shifted, 0), kind, mask)

    def _shr(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, by = parts[-1], self._lanes(operands[2], "u32")
        bits = 8 * size_of(kind)
        shifted = self._lanes(operands[1], kind) >> np.minimum(by, bits - 1).astype(TYPES[kind])
        self._put(operands[0], shifted if kind[0] == "s" else np.where(by < bits, shifted, 0), kind, mask)

    def _bfe(self, parts: Any, operands: Any, mask: Array | None) -> None:
        first, count = int(operands[2], 0), int(operands[3], 0)
        field = self._lanes(operands[1], "u32").astype(np.int64) >> first & (1 << count) - 1
        if parts[-1] == "s32":
            field = np.where(field >> count - 1 & 1, field - (1 << count), field)
        self._put(operands[0], field, parts[-1], mask)

    def _prmt(self, parts: Any, operands: Any, mask: Array | None) -> None:
        low, high, selectors = (self._lanes(operand, "u32").astype(np.int64) for operand in operands[1:])
        picked = np.zeros(self.threads, np.int64)
        for index in range(4):
            selector = selectors >> 4 * index & 15
            byte = (np.where(selector & 4, high, low) >> 8 * (selector & 3)) & 255
            picked |= np.where(selector & 8, np.where(byte & 128, 255, 0), byte) << 8 * index
        self._put(operands[0], picked, "u32", mask)

    def _setp(self, parts: Any, operands: Any, mask: Array | None) -> None:
        comparison, kind = parts[1], parts[-1]
        _check_plain(parts, *_COMPARE, *(name + "u" for name in _COMPARE), "nan", "num")
        x, y = self._lanes(operands[1], kind), self._lanes(operands[2], kind)
        unordered = np.isnan(x) | np.isnan(y) if kind[0] == "f" else np.zeros(self.threads, bool)
        if comparison in ("nan", "num"):
            found = unordered if comparison == "nan" else ~unordered
        elif kind[0] == "f" and len(comparison) == 3:  # true if one of them is not a number
            found = _COMPARE[comparison[:2]](x, y) | unordered
        else:
            found = _COMPARE[comparison](x, y) & ~unordered
        if mask is not None:
            found = np.where(mask, found, self._registers[operands[0]])
        self._registers[operands[0]] = found

    def _selp(self, parts: Any, operands: Any, mask: Array | None) -> None:
        x, y = (self._get(operand, parts[-1]) for operand in operands[1:3])
        self._put(operands[0], np.where(self._predicate(operands[3]), x, y), parts[-1], mask)

    def _mov(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, (to, source) = parts[-1], operands
        if kind == "pred":
            self._registers[to] = self._predicate(source)
        elif to.startswith("{"):
            registers = names(to)
            part = BITS[size_of(kind) // len(registers)]
            values = np.ascontiguousarray(self._lanes(source, kind)).view(part).reshape(self.threads, -1)
            for index, register in enumerate(registers):
                self._put(register, values[:, index], f"b{8 * values.dtype.itemsize}")
        elif source.startswith("{"):
            registers = names(source)
            part = f"b{8 * size_of(kind) // len(registers)}"
            values = np.stack([self._half(register, part) for register in registers], 1)
            self._put(to, np.ascontiguousarray(values).view(BITS[size_of(kind)])[:, 0], kind, mask)
        else:
            self._put(to, self._get(source, kind), kind, mask)

    def _cvt(self, parts: Any, operands: Any, mask: Array | None) -> None:
        _check_plain(parts, "rni", "rzi", "rmi", "rpi")
        to, source = (part for part in parts[1:] if part in TYPES or part in ("bf16", "bf16x2", "f16x2"))
        if to.endswith("x2"):
            narrow = to_bfloat16 if to == "bf16x2" else to_float16
            high, low = (narrow(self._lanes(operand, "f32")).astype(np.uint32) for operand in operands[1:])
            self._put(operands[0], high << 16 | low, "b32", mask)
        elif source == "bf16":
            self._put(operands[0], from_bfloat16(self._get(operands[1], "b16")), "f32", mask)
        elif to == "bf16":
            self._put(operands[0], to_bfloat16(self._lanes(operands[1], source)), "b16", mask)
        else:
            self._convert(parts, to, source, operands, mask)

    def _convert(self, parts: Any, to: str, source: str, operands: Any, mask: Array | None) -> None:
        bits = self._registers[operands[1]]  # it may be wider than what is converted
        values = bits.astype(BITS[size_of(source)]).view(TYPES[source])
        if source[0] == "f" and to[0] in "su":
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
            values = next(whole[part] for part in parts if part in whole)(values)
            limits = np.iinfo(TYPES[to])
            values = np.clip(np.nan_to_num(values), limits.min, limits.max)
        self._put(operands[0], values.astype(TYPES[to]), filling(operands[0], to), mask)
