"""Runs in the converter's own Python, where nothing of r1jax is installed: StableHLO -> .tflite, and a trial of it.

    python litert_worker.py REQUEST.json

It is a process of its own because the converter's packages and r1jax's cannot share an environment, and because the
converter answers what it does not understand with a segmentation fault. Its Python interface is not yet stable.
"""

import importlib.metadata
import json
import math
import sys
from pathlib import Path
from typing import Any

LEAST = 256
"""Numbers from which a matrix is stored in fewer bits: below, its scales and its place cost more than it saves."""
STEPS = {"int4": 7, "int8": 127}
"""Largest code of each kind, of either sign."""
ON_GRID = 1e-3
"""Largest distance of a weight from a code, in steps, at which it is that code: fp32 leaves some 1e-5."""
DEFAULTS = ("MulOptionsT", "AddOptionsT", "SubOptionsT", "DivOptionsT")
"""Options that say nothing where no activation is fused: their absence is read alike."""
MISSING = 3
"""Exit code: a package of the converter is not installed."""
PACKAGES = ("litert-converter", "ai-edge-litert")


def convert(asked: dict[str, Any]) -> dict[str, Any]:
    """Turns StableHLO text into a .tflite file.

    Args:
      asked: "source", "target" (files), "inputs", "outputs" (names in the order of the program), "narrow": whether
        matrices are stored in fewer bits, by `_narrowed`, and "constants": .npz file for the matrices of the
        program as the converter made them, which folds what a norm multiplies by into the weights behind it; or None.

    Returns:
      "stored": bytes of the weights in the file by their type.
    """
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as api

    context = ir.Context()
    api.prepare_mlir_context(context)
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(Path(asked["source"]).read_text())
        names = {"input_names": asked["inputs"], "output_names": asked["outputs"]}
        api.set_signature(module.operation, signature_name="serving_default", **names)
        config = api.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        target = Path(asked["target"])
        target.write_bytes(api.export_flatbuffer_to_bytes(module.operation))
    if asked["constants"]:
        _write_constants(bytearray(target.read_bytes()), asked["constants"])
    if not asked["narrow"]:
        return {"stored": {}}
    content, stored = _narrowed(bytearray(target.read_bytes()))
    target.write_bytes(content)
    return {"stored": stored}


def _write_constants(content: bytearray, file: str) -> None:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    held = [(tensor, model.buffers[tensor.buffer].data) for tensor in model.subgraphs[0].tensors]
    fp32 = [(x.shape, data) for x, data in held if x.type == schema.TensorType.FLOAT32 and data is not None]
    np.savez(file, *(np.frombuffer(bytes(data), np.float32).reshape(shape) for shape, data in fp32 if len(shape) > 1))


def _narrowed(content: bytearray) -> tuple[bytes, dict[str, int]]:
    """Stores matrices as int4 or int8 where that is exact and as fp16 elsewhere; they are widened where they are used.

    What becomes codes is decided before, by who rounds weights to codes and scales (export_rounding.py), so that
    nothing is rounded to less than fp16 here, and no name of a tensor matters.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    (graph,) = model.subgraphs
    widen = _operation_code(model, schema.BuiltinOperator.DEQUANTIZE, version=6)  # the first of int4
    added, stored = [], {"int4": 0, "int8": 0, "fp16": 0, "fp32": 0}
    for place, tensor in enumerate(list(graph.tensors)):
        data = model.buffers[tensor.buffer].data
        if tensor.type != schema.TensorType.FLOAT32 or data is None:
            continue
        weights = np.frombuffer(bytes(data), np.float32).reshape(tensor.shape)
        if not storable(weights.shape) or not (np.abs(weights) < np.finfo(np.float16).max).all():
            stored["fp32"] += weights.nbytes
            continue
        narrow = schema.TensorT()
        narrow.shape, narrow.hasRank, narrow.buffer = tensor.shape, tensor.hasRank, len(model.buffers)
        found = _codes(weights)
        if found is None:
            narrow.type, values = schema.TensorType.FLOAT16, weights.astype(np.float16)
            stored["fp16"] += values.nbytes
        else:
            kind, values, scale, axis = found
            narrow.type, narrow.quantization = (
                getattr(schema.TensorType, kind.upper()),
                schema.QuantizationParametersT(),
            )
            narrow.quantization.scale, narrow.quantization.quantizedDimension = scale, axis
            narrow.quantization.zeroPoint = np.zeros(scale.shape, np.int64)
            values = _packed_int4(values) if kind == "int4" else values
            stored[kind] += values.nbytes
        model.buffers.append(schema.BufferT())
        model.buffers[-1].data = values.reshape(-1).view(np.uint8)
        tensor.buffer = 0
        operation = schema.OperatorT()
        operation.opcodeIndex, operation.inputs, operation.outputs = widen, [len(graph.tensors)], [place]
        graph.tensors.append(narrow)
        added.append(operation)
    graph.operators = added + _triangles(model) + list(graph.operators)
    return _packed(model), stored


def storable(shape: Any) -> bool:
    """Whether tensors of a shape are stored in fewer bits: of numbers enough, and no vectors, which share no scale."""
    return math.prod(shape) >= LEAST and sum(size > 1 for size in shape) > 1


def _codes(weights: Any) -> tuple[str, Any, Any, int] | None:
    """Kind, codes, one scale a channel, and the axis of these, where weights are exactly that; otherwise None."""
    import numpy as np

    for kind, steps in STEPS.items():
        for axis in range(weights.ndim):
            others = tuple(other for other in range(weights.ndim) if other != axis)
            scale = np.maximum(np.abs(weights).max(axis=others, keepdims=True) / steps, np.finfo(np.float32).tiny)
            exact = weights / scale
            codes = np.rint(exact)
            if weights.shape[axis] > 1 and (np.abs(exact - codes) < ON_GRID).all():
                return kind, codes.astype(np.int8), scale.reshape(-1).astype(np.float32), axis
    return None


def _packed_int4(codes: Any) -> Any:
    """Two codes a byte, the first in the lower half."""
    import numpy as np

    halves = codes.reshape(-1).view(np.uint8) & 0xF
    halves = np.pad(halves, (0, halves.size % 2))
    return halves[::2] | (halves[1::2] << 4)


def _triangles(model: Any) -> list[Any]:
    """Operations that make the masks of causal attention, which are constants of a byte a pair, from T numbers."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    (graph,) = model.subgraphs
    added = []
    for place, tensor in enumerate(list(graph.tensors)):
        data = model.buffers[tensor.buffer].data
        if tensor.type != schema.TensorType.BOOL or data is None or len(data) < 4 * LEAST or len(tensor.shape) < 2:
            continue
        *_, rows, columns = tensor.shape
        if rows != columns or bytes(data) != np.tri(rows, dtype=bool).tobytes():
            continue
        model.buffers.append(schema.BufferT())
        model.buffers[-1].data = np.arange(rows, dtype=np.int32).view(np.uint8)
        for shape in ((rows, 1), (1, rows)):
            places = schema.TensorT()
            places.type, places.hasRank, places.buffer = schema.TensorType.INT32, True, len(model.buffers) - 1
            places.shape = [1] * (len(tensor.shape) - 2) + [*shape]
            graph.tensors.append(places)
        tensor.buffer = 0
        operation = schema.OperatorT()
        operation.opcodeIndex = _operation_code(model, schema.BuiltinOperator.GREATER_EQUAL, version=1)
        operation.inputs, operation.outputs = [len(graph.tensors) - 2, len(graph.tensors) - 1], [place]
        added.append(operation)
    return added


def _operation_code(model: Any, operator: int, version: int) -> int:
    """Adds an operator to those that the model names; its place among them."""
    from ai_edge_litert import schema_py_generated as schema

    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = operator
    code.version = version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _packed(model: Any) -> bytes:
    """The file without the names of its tensors, and with each list of numbers once, however often it occurs.

    There is a zero point of 8 bytes to every scale: in a small model they are a tenth of the file.
    """
    import flatbuffers
    import numpy as np

    class Sharing(flatbuffers.Builder):
        """Lets equal vectors be one."""

        def __init__(self) -> None:
            super().__init__(1024)
            self.places: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802 (the package's name)
            key = x.dtype.str, x.tobytes()
            if key not in self.places:
                self.places[key] = super().CreateNumpyVector(x)
            return self.places[key]

    (graph,) = model.subgraphs
    used = {tensor.buffer for tensor in graph.tensors} | {about.buffer for about in model.metadata or ()}
    for place, buffer in enumerate(model.buffers):
        kept = buffer.data is not None and place in used
        buffer.data = np.frombuffer(bytes(buffer.data), np.uint8) if kept else None
    for operation in graph.operators:
        options = operation.builtinOptions
        if type(options).__name__ in DEFAULTS and options.fusedActivationFunction == 0:
            operation.builtinOptions, operation.builtinOptionsType = None, 0
        operation.inputs, operation.outputs = (np.asarray(x, np.int32) for x in (operation.inputs, operation.outputs))
    for tensor in graph.tensors:
        tensor.name, tensor.shape = None, np.asarray(tensor.shape, np.int32)
        tensor.hasRank = not len(tensor.shape)  # a shape that is there says it
        about = tensor.quantization
        if about is None or about.scale is None:
            tensor.quantization = None
        else:
            about.zeroPoint = np.asarray(about.zeroPoint, np.int64)
    builder = Sharing()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Has the exported folder's own runner predict cases.

    Args:
      asked: "folder", "inputs" (.npz file, cases first) and "outputs" (.npz file to write).

    Returns:
      Nothing more.
    """
    import numpy as np

    folder = Path(asked["folder"])
    sys.path.insert(0, str(folder / asked["runner"]))
    from r1jax_edge.artefact import Artefact

    artefact, inputs = Artefact(folder), dict(np.load(asked["inputs"]))
    count = len(next(iter(inputs.values())))
    found = [artefact.predict({name: values[row] for name, values in inputs.items()}) for row in range(count)]
    np.savez(asked["outputs"], **{name: np.stack([one[name] for one in found]) for name in found[0]})
    return {}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        told = {"convert": convert, "run": run}[request["do"]](request)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}, **told}))
