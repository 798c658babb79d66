"""One block of threads: every instruction for all of them at once, an array a register.

Threads of Triton's kernels take every branch together; where they would not, that is a fault. Asynchronous copies and
products run at once or, if they are `late`, not before they are waited for: correct code gives the same either way.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from virtual_gpu.memory import GlobalMemory, SharedMemory
from virtual_gpu.program import Fault, Program, address, names
from virtual_gpu.ptx_types import (
    BITS,
    TYPES,
    Array,
    from_bfloat16,
    immediate,
    size_of,
    to_bfloat16,
    to_float16,
    widened,
)

_LANE = np.arange(32)
_QUAD, _IN_QUAD = _LANE // 4, _LANE % 4
_COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_REDUCE = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce}
Job = Callable[[], None]
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


def _filling(register: str, kind: str) -> str:
    """The type that fills a register which may be wider than what is put into it."""
    if kind[0] == "f" or not register.startswith("%"):
        return kind
    width = {"%rd": 8, "%rs": 2}.get(register.rstrip("0123456789"), 4)
    return kind[0] + str(8 * max(width, size_of(kind)))


class Block:
    """See the module. `number` counts the blocks of a launch from 1; `late` may hold "cp" and "wgmma"."""

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, Any],
        memory: GlobalMemory,
        shared: int,
        grid: tuple[int, int, int],
        place: tuple[int, int, int],
        number: int,
        late: frozenset[str] = frozenset(),
    ) -> None:
        self.program, self.parameters, self.memory, self.number, self.late = program, parameters, memory, number, late
        self.shared = SharedMemory(shared)
        self.threads = program.threads
        self.warps = np.arange(self.threads) // 32
        self._registers: dict[str, Array] = {"%tid.x": np.arange(self.threads, dtype=np.uint32)}
        for axis, index, count in zip("xyz", place, grid, strict=True):
            self._registers[f"%ctaid.{axis}"] = np.full(self.threads, index, np.uint32)
            self._registers[f"%nctaid.{axis}"] = np.full(self.threads, count, np.uint32)
        self._jobs: dict[str, list[Job]] = {"cp": [], "wgmma": []}  # not yet committed
        self._groups: dict[str, list[list[Job]]] = {"cp": [], "wgmma": []}

    @property
    def _moment(self) -> int:
        return self.number << 32 | self.shared.interval

    def run(self) -> None:
        """Run to the end.

        Raises:
            Fault: naming the instruction.
        """
        counter = 0
        with np.errstate(all="ignore"):
            while True:
                instruction = self.program.code[counter]
                counter += 1
                mask = None
                if instruction.predicate:
                    mask = self._registers[instruction.predicate] ^ instruction.negated
                operation = instruction.parts[0]
                if operation in ("bra", "ret"):
                    if mask is not None and mask.any() != mask.all():
                        raise Fault(f"threads part ways at `{instruction.text}`")
                    if mask is not None and not mask.all():
                        continue
                    if operation == "ret":
                        return
                    counter = self.program.labels[instruction.operands[0]]
                    continue
                method = getattr(self, f"_{operation}", None)
                try:
                    if method is None:
                        raise Fault("an instruction that this machine does not know")
                    method(instruction.parts, instruction.operands, mask)
                except Exception as error:  # a type or register that the method did not expect, too
                    raise Fault(f"{error} at `{instruction.text}`") from error

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

    def _max(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(np.fmax if parts[-1] == "f32" else np.maximum, parts, operands, mask)

    def _min(self, parts: Any, operands: Any, mask: Array | None) -> None:
        self._two(np.fmin if parts[-1] == "f32" else np.minimum, parts, operands, mask)

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
        _check_plain(parts, *_COMPARE, *(name + "u" for name in _COMPARE), "nan")
        x, y = self._lanes(operands[1], kind), self._lanes(operands[2], kind)
        unordered = np.isnan(x) | np.isnan(y) if kind[0] == "f" else np.zeros(self.threads, bool)
        if comparison == "nan":
            found = unordered
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
        self._put(operands[0], values.astype(TYPES[to]), _filling(operands[0], to), mask)

    # Memory

    def _ld(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, space, registers = parts[-1], parts[1], names(operands[0])
        width = size_of(kind)
        if space == "param":
            values = np.asarray(self.parameters[operands[1].strip("[] ")]).view(TYPES[kind])
            self._put(registers[0], values, _filling(registers[0], kind))
            return
        lanes = np.ones(self.threads, bool) if mask is None else mask
        data = np.zeros((self.threads, width * len(registers)), np.uint8)
        if lanes.any():
            at = self._addresses(operands[1], space == "global")[lanes]
            if space == "global":
                data[lanes] = self.memory.read(at, data.shape[1], self.warps[lanes], self._moment)
            else:
                data[lanes] = self.shared.read(at, data.shape[1], self.warps[lanes])
        for index, register in enumerate(registers):
            column = np.ascontiguousarray(data[:, index * width : (index + 1) * width]).view(TYPES[kind])[:, 0]
            self._put(register, column, _filling(register, kind), mask)

    def _st(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, space = parts[-1], parts[1]
        columns = []
        for register in names(operands[1]):
            values = self._lanes(register, _filling(register, kind)).astype(TYPES[kind])
            columns.append(np.ascontiguousarray(values).view(np.uint8).reshape(self.threads, -1))
        lanes = np.ones(self.threads, bool) if mask is None else mask
        data, at = np.concatenate(columns, 1)[lanes], self._addresses(operands[0], space == "global")[lanes]
        if not lanes.any():
            return
        if space == "global":
            self.memory.write(at, data, self.warps[lanes], self._moment)
        else:
            self.shared.write(at, data, self.warps[lanes])

    def _bar(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if parts == ("bar", "warp", "sync"):
            return  # the threads of a warp are in step
        if parts != ("bar", "sync") or operands != ("0",) or mask is not None:
            raise Fault("a barrier that this machine does not know")
        self.shared.barrier()

    def _fence(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if parts != ("fence", "proxy", "async", "shared::cta"):
            raise Fault("a fence that this machine does not know")

    # What runs beside the threads

    def _asynchronous(self, queue: str, step: str, operands: Any) -> bool:
        """Whether `step` was one that closes a group, or waits for all but the last few."""
        if step == "commit_group":
            self._groups[queue].append(self._jobs[queue])
            self._jobs[queue] = []
        elif step == "wait_group":
            while len(self._groups[queue]) > int(operands[0]):
                for job in self._groups[queue].pop(0):
                    job()
        else:
            return False
        return True

    def _begin(self, queue: str, job: Job) -> None:
        if queue in self.late:
            self._jobs[queue].append(job)
        else:
            job()

    def _cp(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if self._asynchronous("cp", parts[2], operands):
            return
        to, source = self._addresses(operands[0], False).copy(), self._addresses(operands[1], True).copy()
        size = int(operands[2], 0)
        lanes = np.ones(self.threads, bool) if mask is None else mask
        count = self._lanes(operands[3], "u32").copy() if len(operands) > 3 else np.full(self.threads, size)
        if not np.isin(count[lanes], (0, size)).all():
            raise Fault("a copy that is neither whole nor zeros")

        def copy() -> None:
            data = np.zeros((self.threads, size), np.uint8)
            real = lanes & (count > 0)
            if real.any():
                data[real] = self.memory.read(source[real], size, self.warps[real], self._moment)
            if lanes.any():
                self.shared.write(to[lanes], data[lanes], self.warps[lanes])

        self._begin("cp", copy)

    # Warps

    def _shfl(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if operands[3] != "31" or parts[2] not in ("bfly", "idx"):
            raise Fault("a shuffle that this machine does not know")
        by = self._lanes(operands[2], "u32").reshape(-1, 32).astype(np.int64)
        lane = _LANE ^ by if parts[2] == "bfly" else by & 31
        values = np.take_along_axis(self._lanes(operands[1]).reshape(-1, 32), lane, 1)
        self._put(operands[0].split("|")[0], values.ravel(), "b32", mask)

    def _redux(self, parts: Any, operands: Any, mask: Array | None) -> None:
        values = _REDUCE[parts[2]](self._get(operands[1], parts[-1]).reshape(-1, 32), 1)
        self._put(operands[0], np.repeat(values, 32), parts[-1], mask)

    def _ldmatrix(self, parts: Any, operands: Any, mask: Array | None) -> None:
        rows = self._addresses(operands[1], False).reshape(-1, 32)
        warps = rows.shape[0]
        for index, register in enumerate(names(operands[0])):
            at = rows[:, 8 * index : 8 * index + 8].ravel()
            matrix = self.shared.read(at, 16, np.repeat(np.arange(warps), 8)).view(np.uint16).reshape(warps, 8, 8)
            if "trans" in parts:
                matrix = matrix.transpose(0, 2, 1)
            pairs = matrix[:, _QUAD].reshape(warps, 32, 4, 2)[:, _LANE, _IN_QUAD]
            self._put(register, np.ascontiguousarray(pairs).view(np.uint32).ravel())

    def _stmatrix(self, parts: Any, operands: Any, mask: Array | None) -> None:
        rows = self._addresses(operands[0], False).reshape(-1, 32)
        warps = rows.shape[0]
        for index, register in enumerate(names(operands[1])):
            pairs = np.ascontiguousarray(self._lanes(register)).view(np.uint16).reshape(warps, 8, 8)
            if "trans" in parts:
                pairs = pairs.transpose(0, 2, 1)
            data = np.ascontiguousarray(pairs).view(np.uint8).reshape(warps * 8, 16)
            self.shared.write(rows[:, 8 * index : 8 * index + 8].ravel(), data, np.repeat(np.arange(warps), 8))

    # Matrix products

    def _fragment(self, registers: list[str], rows: int, columns: int, down: int) -> Array:
        """[warps, rows, columns] 16-bit elements, of which each lane holds pairs; the registers step down every
        `down`-th, then across."""
        out = np.empty((self.threads // 32, rows, columns), np.uint16)
        for index, register in enumerate(registers):
            pairs = np.ascontiguousarray(self._get(register)).view(np.uint16).reshape(-1, 32, 2)
            for side in range(2):
                out[:, _QUAD + 8 * (index % down), 2 * _IN_QUAD + 8 * (index // down) + side] = pairs[:, :, side]
        return out

    def _mma(self, parts: Any, operands: Any, mask: Array | None) -> None:
        shape, kind = parts[3], parts[-2]
        if shape != "m16n8k16" or parts[4:6] != ("row", "col") or kind not in ("bf16", "f16"):
            raise Fault("a matrix product that this machine does not know")
        to, left, right, more = (names(operand) for operand in operands)
        a = widened(self._fragment(left, 16, 16, 2), kind)
        b = widened(self._fragment(right, 8, 16, 1), kind)
        product = a @ b.transpose(0, 2, 1)  # [warps, 16, 8]
        for index, (register, addend) in enumerate(zip(to, more, strict=True)):
            part = product[:, _QUAD + 8 * (index // 2), 2 * _IN_QUAD + index % 2]
            self._put(register, self._get(addend, "f32") + part.ravel(), "f32")

    def _wgmma(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if parts[1] == "fence" or self._asynchronous("wgmma", parts[1], operands):
            return
        shape, kind = parts[4], parts[-1]
        width = int(shape.removeprefix("m64n").removesuffix("k16"))
        left, right = operands[1], self._get(operands[2], "u64").copy()
        from_registers = left.startswith("{")
        signs, turned = operands[4:6], [operand == "1" for operand in operands[6:]]
        if signs != ("1", "1") or kind not in ("bf16", "f16"):
            raise Fault("a matrix product that this machine does not know")
        adds, matrix = self._predicate(operands[3]), None if from_registers else self._get(left, "u64").copy()

        def multiply() -> None:
            fragment = self._fragment(names(left), 16, 16, 2) if from_registers else None
            for group in range(self.threads // 128):
                at = slice(128 * group, 128 * group + 128)
                warps = np.arange(4 * group, 4 * group + 4)
                if fragment is not None:
                    a = fragment[warps].reshape(64, 16)
                else:
                    assert matrix is not None
                    a = self._matrix(matrix[at], 64, turned[0], warps)
                b = self._matrix(right[at], width, turned[-1], warps)
                self._accumulate(names(operands[0]), widened(a, kind) @ widened(b, kind).T, at, adds[at])

        self._begin("wgmma", multiply)

    def _accumulate(self, registers: list[str], product: Array, at: slice, adds: Array) -> None:
        """Hand out the [64, n] product of a warpgroup's four warps."""
        lane, index = np.arange(128)[None, :], np.arange(len(registers))[:, None]
        row = 16 * (lane // 32) + lane % 32 // 4 + 8 * (index // 2 % 2)
        column = 8 * (index // 4) + 2 * (lane % 4) + index % 2
        empty = np.empty(0, np.uint32)
        values = np.stack([self._old(register, empty) for register in registers])  # [registers, threads]
        old = np.where(adds, values[:, at].view(np.float32), 0)
        values[:, at] = (product[row, column] + old).astype(np.float32).view(np.uint32)
        self._registers.update(zip(registers, values, strict=True))

    def _matrix(self, descriptors: Array, rows: int, turned: bool, warps: Array) -> Array:
        """[rows, 16] elements of an operand in shared memory, rows along M or N.

        `turned`: neighbours in memory are neighbours along the rows. The layouts are those of the PTX ISA, section
        "Asynchronous Warpgroup Level Matrix Shared Memory Layout".
        """
        if (descriptors != descriptors[0]).any():
            raise Fault("the threads of a warpgroup describe different matrices")
        descriptor = int(descriptors[0])
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = descriptor >> 62
        if descriptor >> 49 & 7 or not swizzle:
            raise Fault("a matrix layout that this machine does not know")
        span = {1: 128, 2: 64, 3: 32}[swizzle]  # bytes in a line
        row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
        if turned:
            line = span // 2
            at = start + row // line * leading + column // 8 * stride + column % 8 * span + row % line * 2
        else:
            at = start + row // 8 * stride + row % 8 * span + column * 2
        at ^= at >> 3 & {1: 0x70, 2: 0x30, 3: 0x10}[swizzle]
        read = self.shared.read_by_all(at.ravel(), 2, warps)
        return read.view(np.uint16).reshape(at.shape)
