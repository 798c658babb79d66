"""One block of threads: every instruction for all of them at once.

Threads of Triton's kernels take every branch together; where they would not, that is a fault. Asynchronous copies and
products run at once or, if they are `late`, not before they are waited for: correct code gives the same either way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from virtual_gpu.lanes import Lanes, filling
from virtual_gpu.memory import GlobalMemory, SharedMemory
from virtual_gpu.program import Fault, Program, names
from virtual_gpu.ptx_types import TYPES, Array, size_of, widened

_LANE = np.arange(32)
_QUAD, _IN_QUAD = _LANE // 4, _LANE % 4
_REDUCE = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce}
Job = Callable[[], None]


class Block(Lanes):
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
        super().__init__(program.threads)
        self.program, self.parameters, self.memory, self.number, self.late = program, parameters, memory, number, late
        self.shared = SharedMemory(shared)
        self.warps = np.arange(self.threads) // 32
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

    # Memory

    def _ld(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, space, registers = parts[-1], parts[1], names(operands[0])
        width = size_of(kind)
        if space == "param":
            values = np.asarray(self.parameters[operands[1].strip("[] ")]).view(TYPES[kind])
            self._put(registers[0], values, filling(registers[0], kind))
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
            self._put(register, column, filling(register, kind), mask)

    def _st(self, parts: Any, operands: Any, mask: Array | None) -> None:
        kind, space = parts[-1], parts[1]
        columns = []
        for register in names(operands[1]):
            values = self._lanes(register, filling(register, kind)).astype(TYPES[kind])
            columns.append(np.ascontiguousarray(values).view(np.uint8).reshape(self.threads, -1))
        lanes = np.ones(self.threads, bool) if mask is None else mask
        data, at = np.concatenate(columns, 1)[lanes], self._addresses(operands[0], space == "global")[lanes]
        if not lanes.any():
            return
        if space == "global":
            self.memory.write(at, data, self.warps[lanes], self._moment)
        else:
            self.shared.write(at, data, self.warps[lanes])

    def _atom(self, parts: Any, operands: Any, mask: Array | None) -> None:
        if parts != ("atom", "global", "gpu", "acq_rel", "add", "u32") or mask is None or mask.sum() != 1:
            raise Fault("an atomic operation that this machine does not know")
        at, value = self._addresses(operands[1], True)[mask], self._lanes(operands[2], "u32")[mask]
        old = self.memory.add(int(at[0]), int(value[0]), int(self.warps[mask][0]), self._moment)
        self._put(operands[0], np.full(self.threads, old, np.int32).view(np.uint32), "b32", mask)

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
