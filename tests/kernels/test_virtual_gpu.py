"""The machine that runs compiled kernels: it computes what PTX says, and refuses what a GPU would let pass."""

import itertools

import numpy as np
import pytest
from virtual_gpu.block import Block
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.program import Fault, Program

THREADS = 64
# %rd1: address of the thread's own word of the first array; %rd2: of the second one; %r1: its bytes in shared memory.
PROLOGUE = """
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd0, %r0, 4;
ld.param.b64 %rd1, [toy_param_0];
ld.param.b64 %rd2, [toy_param_1];
add.s64 %rd1, %rd1, %rd0;
add.s64 %rd2, %rd2, %rd0;
shl.b32 %r1, %r0, 2;
ld.global.b32 %r2, [%rd1];
"""


def run(code: str, *, words: int = THREADS, blocks: int = 1, late: str = "") -> np.ndarray:
    """What `code`, behind the prologue, leaves in the second array, which begins as zeros; the first holds 0, 1 ..."""
    text = (
        ".visible .entry toy(\n.param .u64 .ptr .global .align 1 toy_param_0,\n.param .u64 toy_param_1\n)\n"
        f".reqntid {THREADS}\n{{\n.reg .b32 %r<9>;\n.loc 1 2 3\n{PROLOGUE}{code}\nret;\n// -- End function\n}}\n"
    )
    arrays = np.arange(THREADS, dtype=np.int32), np.zeros(words, np.int32)
    memory = GlobalMemory({x.ctypes.data: x.nbytes for x in arrays})
    parameters = {f"toy_param_{index}": np.uint64(x.ctypes.data) for index, x in enumerate(arrays)}
    for number in range(1, blocks + 1):
        place = (number - 1, 0, 0)
        schedule = frozenset(late.split())
        Block(Program(text), parameters, memory, 4 * THREADS, (blocks, 1, 1), place, number, schedule).run()
    return arrays[1]


def test_it_computes() -> None:
    lane = np.arange(THREADS)
    assert np.array_equal(run("mad.lo.s32 %r3, %r2, %r2, -1;\nst.global.b32 [%rd2+0], %r3;"), lane * lane - 1)
    halved = run("cvt.rn.f32.s32 %r3, %r2;\nmul.f32 %r3, %r3, 0f3F000000;\nst.global.b32 [%rd2], {%r3};")
    assert np.array_equal(halved.view(np.float32), lane / 2)
    most = "mov.b32 %r3, 0f40000000;\nmov.b32 %r4, 0f40400000;\nmax.f32 %r5, %r3, %r4, 0f3F800000;"
    assert set(run(most + "\nst.global.b32 [%rd2], %r5;").view(np.float32)) == {3.0}
    clamped = "sub.s32 %r3, %r2, 32;\nmax.relu.s32 %r4, %r3, -9;\nmin.relu.s32 %r5, %r3, 5;\nadd.s32 %r5, %r5, %r4;"
    expected = np.maximum(lane - 32, 0) + np.clip(lane - 32, 0, 5)
    assert np.array_equal(run(clamped + "\nst.global.b32 [%rd2], %r5;"), expected)
    pair = "mov.b64 %rd3, {%r2, %r2};\ncvt.rn.f32.s32 %r3, %r2;\nmov.b64 %rd4, {%r3, 0f3F000000};\n"
    twice = run(pair + "fma.rn.f32x2 %rd5, %rd4, %rd4, %rd4;\nmov.b64 {%r4, %r5}, %rd5;\nst.global.b32 [%rd2], %r4;")
    assert np.array_equal(twice.view(np.float32), lane * lane + lane)
    odd = "and.b32 %r3, %r2, 1;\nsetp.eq.b32 %p1, %r3, 0;\n@!%p1 st.global.b32 [%rd2], %r2;"
    assert np.array_equal(run(odd), np.where(lane % 2, lane, 0))
    assert np.array_equal(run("shfl.sync.bfly.b32 %r3, %r2, 3, 31, -1;\nst.global.b32 [%rd2], %r3;"), lane ^ 3)


def test_a_loop_ends() -> None:
    loop = "mov.b32 %r3, 0;\n$L__A:\nadd.s32 %r3, %r3, 1;\nsetp.lt.s32 %p1, %r3, 10;\n@%p1 bra $L__A;"
    assert np.array_equal(run(loop + "\nst.global.b32 [%rd2], %r3;"), np.full(THREADS, 10))


def test_bfloat16_is_rounded_to_even() -> None:
    pair = "mov.b32 %r3, 0f3F808000;\nmov.b32 %r4, 0f3F818000;\ncvt.rn.bf16x2.f32 %r5, %r3, %r4;"
    assert set(run(pair + "\nst.global.b32 [%rd2], %r5;")) == {0x3F80_3F82}  # the first operand is the upper half


def test_what_is_out_of_bounds_or_out_of_line_is_a_fault() -> None:
    with pytest.raises(Fault, match=r"4 bytes at 160 of a storage of 160 are out of bounds at `st\.global"):
        run("st.global.b32 [%rd2], %r2;", words=40)
    with pytest.raises(Fault, match="not aligned"):
        run("ld.global.b32 %r3, [%rd1+2];")
    with pytest.raises(Fault, match="beyond the 256 of shared memory"):
        run("st.shared.b32 [%r1+4], %r2;")


def test_a_race_is_a_fault_and_a_barrier_ends_it() -> None:
    # Every thread reads the word of the one 32 threads on, which belongs to the other warp.
    turned = "xor.b32 %r3, %r1, 128;\nld.shared.b32 %r4, [%r3];\nst.global.b32 [%rd2], %r4;"
    store = "st.shared.b32 [%r1], %r2;\n"
    with pytest.raises(Fault, match="reads shared memory that another one has written since the last barrier"):
        run(store + turned)
    assert np.array_equal(run(store + "bar.sync 0;\n" + turned), np.arange(THREADS) ^ 32)
    with pytest.raises(Fault, match="writes shared memory that another one has read since the last barrier"):
        run(store + "bar.sync 0;\n" + turned + store)
    with pytest.raises(Fault, match="two threads write different values to the same shared memory at once"):
        run("and.b32 %r3, %r1, 127;\nst.shared.b32 [%r3], %r2;")
    with pytest.raises(Fault, match="two warps write the same shared memory between two barriers"):
        run(store + "xor.b32 %r3, %r1, 128;\nst.shared.b32 [%r3], %r2;")
    assert not run("and.b32 %r3, %r1, 127;\nst.shared.b32 [%r3], 7;").any()  # the same value: whoever is last


def test_blocks_may_not_meet_in_global_memory() -> None:
    with pytest.raises(Fault, match="a thread writes what another one writes"):
        run("st.global.b32 [%rd2], %r2;", blocks=2)
    with pytest.raises(Fault, match="a thread writes what another one reads"):
        run("mov.u32 %r3, %ctaid.x;\nsetp.eq.b32 %p1, %r3, 1;\n@%p1 st.global.b32 [%rd1], %r2;", blocks=2)


def test_an_atomic_addition_puts_blocks_in_order() -> None:
    """The second of two blocks reads what the first has written, behind what each has added to the last word."""
    thread = "setp.eq.b32 %p1, %r0, 0;\nld.param.b64 %rd3, [toy_param_1];\nmov.u32 %r3, %ctaid.x;\nmov.b32 %r4, 1;\n"
    write = "setp.eq.b32 %p2, %r3, 0;\n@%p2 st.global.b32 [%rd2], %r2;\n"
    add = "mov.b32 %r5, 0;\n@%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd3+512], %r4;\n"
    read = "setp.eq.b32 %p2, %r3, 1;\n@%p2 ld.global.b32 %r6, [%rd2];\n@%p2 st.global.b32 [%rd2+256], %r6;\n"
    last = "setp.eq.b32 %p3, %r5, 1;\n@%p3 st.global.b32 [%rd3+512], 7;\n"
    barrier = "bar.sync 0;\n"
    code = thread + write + barrier + add + barrier + read + last
    found = run(code, words=129, blocks=2)
    assert np.array_equal(found[:64], found[64:128])
    assert found[128] == 7
    for left_out in (write + add + barrier + read, write + barrier + add + read, write + barrier + read):
        with pytest.raises(Fault, match="a thread reads what another one writes"):
            run(thread + left_out, words=129, blocks=2)
    with pytest.raises(Fault, match="a thread adds to what another one writes"):
        run(thread + barrier + add + barrier + "@%p1 st.global.b32 [%rd3+512], 7;", words=129, blocks=2)
    with pytest.raises(Fault, match="a thread writes what another one reads"):
        run(thread + "setp.eq.b32 %p2, %r3, 1;\nld.global.b32 %r6, [%rd2];\n@%p2 st.global.b32 [%rd2], 7;", blocks=2)


def test_nor_may_warps_without_a_barrier() -> None:
    # Every thread reads the word of the one 32 threads on, in the array that all have written.
    turned = "xor.b32 %r3, %r1, 128;\nsub.u32 %r3, %r3, %r1;\ncvt.s64.s32 %rd3, %r3;\nadd.s64 %rd3, %rd3, %rd2;\n"
    turned += "ld.global.b32 %r4, [%rd3];\n"
    store = "st.global.b32 [%rd2], %r2;\n"
    with pytest.raises(Fault, match="a thread reads what another one writes"):
        run(store + turned)
    run(store + "bar.sync 0;\n" + turned)
    with pytest.raises(Fault, match="a thread writes what another one reads"):
        run(store + "bar.sync 0;\n" + turned + store)
    with pytest.raises(Fault, match="a thread reads what another one writes"):
        run(store + "bar.warp.sync -1;\n" + turned)  # of the threads of a warp only
    with pytest.raises(Fault, match="two threads write different values to the same memory at once"):
        run("ld.param.b64 %rd3, [toy_param_1];\nst.global.b32 [%rd3], %r2;")


def test_a_copy_that_is_read_too_early_shows_as_a_difference() -> None:
    copy = "cp.async.ca.shared.global [%r1], [%rd1], 4;\ncp.async.commit_group;\n"
    wait, read = "cp.async.wait_group 0;\n", "ld.shared.b32 %r3, [%r1];\nst.global.b32 [%rd2], %r3;\n"
    early, late = (run(copy + read + wait, late=late) for late in ("", "cp"))
    assert np.array_equal(early, np.arange(THREADS))
    assert set(late) == {-1}
    for late in ("", "cp"):
        assert np.array_equal(run(copy + wait + read, late=late), np.arange(THREADS))


def test_threads_that_part_ways_are_a_fault() -> None:
    with pytest.raises(Fault, match="threads part ways"):
        run("setp.lt.s32 %p1, %r2, 5;\n@%p1 bra $L__A;\nst.global.b32 [%rd2], %r2;\n$L__A:")


@pytest.mark.parametrize(
    "code",
    [
        "vote.sync.all.pred %p1, %p1, -1;",
        "shfl.sync.up.b32 %r3, %r2, 1, 0, -1;",
        "bar.sync 1, 32;",
        "setp.lt.and.s32 %p1, %r2, 5, %p1;",
        "add.sat.s32 %r3, %r2, %r2;",
        "add.s32 %r3, %r2, %r77;",
    ],
)
def test_what_it_does_not_know_it_does_not_guess(code: str) -> None:
    with pytest.raises(Fault, match=r"does not know|'%r77' at `add"):
        run(code)


def test_matrix_products_agree_with_numpy() -> None:
    """The layouts of a warp's fragments: 16 x 16 times 16 x 8 small integers, exact in bfloat16. (Loads from shared
    memory and warpgroup products have the kernels themselves for a test.)"""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    code = ["mov.b32 %r9, 0;"]
    for lane, register in itertools.product(range(32), range(6)):
        quad, pair = lane // 4, 2 * (lane % 4)
        if register < 4:
            two = a[quad + 8 * (register % 2), pair + 8 * (register // 2) :][:2]
        else:
            two = b[pair + 8 * (register - 4) :, quad][:2]
        bits = two.view(np.uint32) >> 16
        code += [
            f"setp.eq.b32 %p1, %r0, {lane};",
            f"@%p1 mov.b32 %r{10 + register}, {int(bits[0] | bits[1] << 16):#x};",
        ]
    code += [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, "
        "{%r14, %r15}, {%r9, %r9, %r9, %r9};",
        "mul.wide.u32 %rd3, %r0, 12;",  # beside the 4 bytes a thread that %rd2 has already
        "add.s64 %rd3, %rd3, %rd2;",
        "setp.lt.s32 %p2, %r0, 32;",
        "@%p2 st.global.v4.b32 [%rd3], {%r20, %r21, %r22, %r23};",
    ]
    found = run("\n".join(code), words=4 * THREADS).view(np.float32)[:128].reshape(32, 4)
    product = a @ b
    for lane, register in itertools.product(range(32), range(4)):
        row, column = lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2
        assert found[lane, register] == product[row, column]
