"""PTX's types as NumPy's. Registers hold bits; an instruction says what they mean."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

TYPES: dict[str, Any] = {
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bytes -> type


def size_of(kind: str) -> int:
    """Bytes of a type."""
    return np.dtype(TYPES[kind]).itemsize


def from_bfloat16(bits: Array) -> Array:
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    """float32 -> uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_float16(x: Array) -> Array:
    """float32 -> uint16."""
    return x.astype(np.float16).view(np.uint16)


def widened(bits: Array, kind: str) -> Array:
    """uint16 of "bf16" or "f16" -> float32."""
    return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def immediate(text: str, kind: str) -> Any:
    """`-8` or `0f3F800000` as a number of a type."""
    bits = int(text[2:], 16) if text.startswith("0f") else int(text.removesuffix("U"), 0)
    size = size_of(kind)
    return BITS[size](bits & ((1 << 8 * size) - 1)).view(TYPES[kind])
