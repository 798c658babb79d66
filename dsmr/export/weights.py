"""Weights as an exported graph holds them: float32, or eight bits with a scale for every block of inputs.

int8 is ONNX Runtime's `MatMulNBits`, whose activations are rounded to eight bits too, or, in a portable graph,
`DequantizeLinear` with a scale for every output before a plain product. Only the large matrices of the layers are
converted, as in PyTorch's step (`dsmr.generation.stepping.weights`): embedding, norms and logits stay in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsmr.export.graph import VENDOR, Graph

BLOCK, SMALLEST = 128, 16  # inputs that share a scale
MOST = 127
COMPUTE_INT8 = 4  # `accuracy_level`: the products themselves are of eight bits

Matrix = npt.NDArray[np.float32]


def product(graph: Graph, x: str, weight: Matrix, name: str, weights: str, portable: bool) -> str:
    """x (..., inputs) @ weight.T, where `weight` is (outputs, inputs): (..., outputs)."""
    if weights == "float32":
        return graph.node("MatMul", x, graph.constant(weight.T, name))
    if portable:
        columns, of_output = by_output(weight)
        steps = graph.constant(columns.T, name), graph.constant(of_output, f"{name}.scale")
        return graph.node("MatMul", x, graph.node("DequantizeLinear", *steps, axis=1))
    block = block_of(weight.shape[1])
    rounded, scales = by_block(weight, block)
    packed, steps_of = graph.constant(rounded, name), graph.constant(scales, f"{name}.scale")
    sizes = {"N": weight.shape[0], "K": weight.shape[1], "bits": 8, "block_size": block}
    return graph.node("MatMulNBits", x, packed, steps_of, domain=VENDOR, accuracy_level=COMPUTE_INT8, **sizes)


def block_of(inputs: int) -> int:
    """Inputs of a block: a power of two, no larger than the matrix needs."""
    block = SMALLEST
    while block < min(inputs, BLOCK):
        block *= 2
    return block


def by_block(weight: Matrix, block: int) -> tuple[npt.NDArray[np.uint8], Matrix]:
    """(outputs, inputs) -> (outputs, blocks, block) with 128 for zero, and scales (outputs, blocks); the last block is
    filled up with zeros."""
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -inputs % block))).reshape(outputs, -1, block)
    scales = (np.maximum(np.abs(padded).max(-1), 1e-12) / MOST).astype(np.float32)
    rounded = np.clip(np.rint(padded / scales[..., None]), -MOST, MOST)
    return (rounded + 128).astype(np.uint8), scales


def by_output(weight: Matrix) -> tuple[npt.NDArray[np.int8], Matrix]:
    """(outputs, inputs) in int8, and scales (outputs,)."""
    scales = (np.maximum(np.abs(weight).max(1), 1e-12) / MOST).astype(np.float32)
    return np.clip(np.rint(weight / scales[:, None]), -MOST, MOST).astype(np.int8), scales
