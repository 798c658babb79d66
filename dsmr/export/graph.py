"""A graph of ONNX nodes under construction: names are given out here, so that what builds it reads as arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

VENDOR = "com.microsoft"  # the domain of ONNX Runtime's own operators
OPSET, IR_VERSION = 20, 9  # Gelu is of 20, LayerNormalization of 17; runtimes of 2024 and later read both
LAST = 2**62  # "to the end", as a slice says it
KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}

Array = npt.NDArray[Any]


class Graph:
    """Nodes, constants, inputs and outputs; `model` puts them together."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._known: dict[tuple[Any, ...], str] = {}  # small constants, by content
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def constant(self, value: Any, name: str | None = None, dtype: Any = None) -> str:
        """A constant, under a name of its own or, for a small one, shared with all that are equal."""
        array = np.asarray(value, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes()) if name is None else (name,)
        if key not in self._known:
            self._known[key] = name or f"constant.{len(self._known)}"
            self._constants[self._known[key]] = numpy_helper.from_array(array, self._known[key])
        return self._known[key]

    def ints(self, *values: int) -> str:
        """A row of int64."""
        return self.constant(np.array(values, np.int64))

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, KINDS[kind], shape))
        return name

    def output(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, KINDS[kind], shape))
        return name

    def nodes(self, operator: str, *inputs: str, outputs: int | Sequence[str], domain: str = "", **how: Any) -> Any:
        """A node with several outputs: their names. An input that is left out is named ""."""
        index = len(self._nodes)
        names = [f"{operator}.{index}.{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        self._nodes.append(helper.make_node(operator, given, names, name=f"{operator}.{index}", domain=domain, **how))
        return names

    def node(self, operator: str, *inputs: str, name: str | None = None, domain: str = "", **how: Any) -> str:
        """A node with one output: its name."""
        return self.nodes(operator, *inputs, outputs=1 if name is None else [name], domain=domain, **how)[0]

    def cast(self, x: str, kind: str) -> str:
        return self.node("Cast", x, to=KINDS[kind])

    def slice(self, x: str, start: int, stop: int, axis: int = 0) -> str:
        """x from `start` to before `stop` along an axis."""
        return self.node("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))

    def model(self, about: str) -> ModelProto:
        """The whole, as a model whose description is `about`."""
        graph = helper.make_graph(self._nodes, "dsmr", self._inputs, self._outputs, list(self._constants.values()))
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(VENDOR, 1)] * (VENDOR in domains)
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dsmr", doc_string=about
        )
