"""Triton's interpreter, without what it does for nothing: a small launch takes a third of the time.

It puts its own words in place of the language's at every launch, and once more whenever a kernel calls another
function, although they are in place then. It computes whether an integer has left its range, for an assertion that it
leaves out. And it makes the same dictionary of dtypes anew for each value. What a kernel computes is untouched, and a
Triton that does these things otherwise is left as it is: only the time is lost.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

_NAMES = ("_patch_lang", "_get_np_dtype", "GridExecutor", "interpreter_semantic", "interpreter_builder")
_DONE = SimpleNamespace(restore=lambda: None)  # what there is to take back of words that were in place


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, in this process."""
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in _NAMES):
        _words_once_a_launch(interpreter, patch)
        _dtypes_once(interpreter, patch)
        if not interpreter.interpreter_builder.options.debug:
            operation = "binary_op_sanitize_overflow_impl"
            patch.setattr(interpreter.interpreter_semantic, operation, lambda *given: None, raising=False)


def _words_once_a_launch(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    put_in, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    in_place: set[tuple[bool, bool]] = set()
    spoken: dict[Callable[..., Any], tuple[bool, bool]] = {}  # which of the two modules a function's own module names

    def put_in_once(function: Callable[..., Any]) -> Any:
        if function not in spoken:
            values = function.__globals__.values()
            spoken[function] = any(x is tl for x in values), any(x is tl.core for x in values)
        if spoken[function] in in_place:
            return _DONE
        in_place.add(spoken[function])
        return put_in(function)

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        in_place.clear()
        try:
            launch(self, *arguments, **named)
        finally:
            in_place.clear()

    patch.setattr(interpreter, "_patch_lang", put_in_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)


def _dtypes_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    work_out, known = interpreter._get_np_dtype, {}

    def dtype_of(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(scalar, tl.pointer_type):
            return work_out(scalar)
        if scalar not in known:
            known[scalar] = work_out(scalar)
        return known[scalar]

    patch.setattr(interpreter, "_get_np_dtype", dtype_of)
