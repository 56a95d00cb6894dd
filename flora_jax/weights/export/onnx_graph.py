"""A graph of ONNX, node by node."""

from typing import Any

import numpy as np

# Gelu came with 20, and nothing newer is needed: the lowest that has every operation is what most
# runtimes take (ONNX Runtime from 1.17).
OPSET = 20
Value = str  # the name of what a node gives
Input = Value | np.ndarray | np.generic | list[int]  # all but the first become constants


class Graph:
    """A place in a graph under construction, such as that of a block; `at` gives those inside.

    Floating point constants and parameters take the graph's dtype.
    """

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)
        self._prefix = ""
        self._nodes: list[Any] = []
        self._initializers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple, Value] = {}  # by dtype, shape and content

    def at(self, name: str) -> "Graph":
        """The same graph, where names begin with this one."""
        inside = object.__new__(Graph)
        inside.__dict__ |= self.__dict__
        inside._prefix = f"{self._prefix}{name}."
        return inside

    def parameter(self, name: str, array: Any) -> Value:
        """An initializer under the parameter's own name; `array` may be its transpose."""
        full_name = self._prefix + name
        with np.errstate(over="ignore"):  # what half floats cannot hold, the check refuses
            self._initializers[full_name] = np.asarray(array).astype(self.dtype, order="C")
        return full_name

    def node(self, operation: str, *inputs: Input, **attributes: Any) -> Value:
        """What an operation gives."""
        return self.nodes(operation, 1, *inputs, **attributes)[0]

    def nodes(self, operation: str, number: int, *inputs: Input, **attributes: Any) -> list[Value]:
        """All outputs of an operation that gives several."""
        from onnx import helper  # an optional package: not before it is needed

        name = f"{self._prefix}{operation}_{len(self._nodes)}"
        outputs = [name] if number == 1 else [f"{name}_{i}" for i in range(number)]
        values = [x if isinstance(x, str) else self._constant(np.asarray(x)) for x in inputs]
        self._nodes.append(helper.make_node(operation, values, outputs, name, **attributes))
        return outputs

    def cast(self, x: Value, dtype: str) -> Value:
        from onnx import helper

        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def _constant(self, array: np.ndarray) -> Value:
        """Equal ones are stored once."""
        is_float = np.issubdtype(array.dtype, np.floating)
        array = np.asarray(array, self.dtype if is_float else np.int64, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"constant_{len(self._constants)}"
            self._initializers[name] = array
        return self._constants[key]

    def model(self, inputs: dict[str, list], output: Value, outputs: dict[str, list]) -> Any:
        """The finished onnx.ModelProto.

        Args:
          inputs: names and shapes, a string for a size that is open; float32.
          output: what the last node gives; it takes the one name in `outputs`.
        """
        from onnx import TensorProto, helper, numpy_helper

        (name,) = outputs
        assert self._nodes[-1].output[0] == output
        self._nodes[-1].output[0] = name

        def infos(shapes):
            return [
                helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()
            ]

        tensors = [numpy_helper.from_array(a, n) for n, a in self._initializers.items()]
        graph = helper.make_graph(self._nodes, "flora_jax", infos(inputs), infos(outputs), tensors)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="flora_jax",
        )
