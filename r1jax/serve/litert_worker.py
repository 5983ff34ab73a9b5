"""The part of device_worker.py that knows LiteRT's converter: StableHLO -> .tflite.

Its packages and r1jax's cannot share an environment, and it answers what it does not understand with a segmentation
fault. Its Python interface is not yet stable.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

LEAST = 256
"""Numbers from which a matrix is stored in fewer bits: below, its scales and its place cost more than it saves."""
STEPS = {"int4": 7, "int8": 127}
"""Largest code of each kind, of either sign."""
ON_GRID = 1e-3
"""Largest distance of a weight from a code, in steps, at which it is that code: fp32 leaves some 1e-5."""
SAME = 1e-5
"""Largest distance of a weight from what given codes stand for, as a share of that: what folding a norm leaves."""
DEFAULTS = ("MulOptionsT", "AddOptionsT", "SubOptionsT", "DivOptionsT")
"""Options that say nothing where no activation is fused: their absence is read alike."""


def convert(asked: dict[str, Any]) -> dict[str, Any]:
    """Turns StableHLO text into a .tflite file.

    Args:
      asked: "source", "target" (files), "inputs", "outputs" (names in the order of the program), "narrow": whether
        matrices are stored in fewer bits, by `_narrowed`, "codes": .npz file of codes that weights are to be stored as,
        see `_narrowed`, or None, and "constants": .npz file for the constants of the program as the converter made
        them, which folds what a norm multiplies by into the weights behind it; or None.

    Returns:
      "stored": bytes of the weights in the file by their type, and "found": names of the given codes that it holds.
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
    if not asked["narrow"] and asked["codes"] is None:
        return {"stored": {}, "found": []}
    given = None if asked["codes"] is None else _read_codes(asked["codes"])
    content, stored, found = _narrowed(bytearray(target.read_bytes()), given, narrow=asked["narrow"])
    target.write_bytes(content)
    return {"stored": stored, "found": found}


def _write_constants(content: bytearray, file: str) -> None:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    held = [(tensor, model.buffers[tensor.buffer].data) for tensor in model.subgraphs[0].tensors]
    fp32 = [(x.shape, data) for x, data in held if x.type == schema.TensorType.FLOAT32 and data is not None]
    np.savez(file, *(np.frombuffer(bytes(data), np.float32).reshape(shape) for shape, data in fp32))


class Given(NamedTuple):
    """Codes that a weight is to be stored as."""

    kind: str
    groups: Any
    """[G, b], the numbers of a weight in the order of the file; the last group of a row is filled up with zeros."""
    scale: Any
    """[G]."""
    row: int
    """Numbers of a row."""

    def grouped(self, weights: Any) -> Any:
        """Weights as their codes are."""
        import numpy as np

        rows = weights.reshape(-1, self.row)
        missing = -self.row % self.groups.shape[1]
        return np.pad(rows, ((0, 0), (0, missing))).reshape(self.groups.shape)

    def flat(self, grouped: Any) -> Any:
        """Undoes `grouped`, all rows of the weight in one."""
        return grouped.reshape(-1, self.row - self.row % -self.groups.shape[1])[:, : self.row].reshape(-1)


class Stored(NamedTuple):
    """How a weight is stored."""

    kind: str
    values: Any
    """Codes, of the weight's shape or of another with as many numbers."""
    scale: Any
    axis: int
    """Of `values`, along which scales lie."""
    columns: Any = None
    """What the weight's columns are multiplied by behind its scales, fp32; None is nothing."""
    row: int | None = None
    """Numbers of a row where groups are filled up."""


def _read_codes(file: str) -> dict[str, Given]:
    """Codes by name from NAME.kind and the other fields."""
    import numpy as np

    with np.load(file) as held:
        names = [name.removesuffix(".kind") for name in held if name.endswith(".kind")]
        parts = {name: [held[f"{name}.{part}"] for part in Given._fields] for name in names}
    return {name: Given(str(kind), groups, scale, int(row)) for name, (kind, groups, scale, row) in parts.items()}


def _narrowed(
    content: bytearray, given: dict[str, Given] | None, *, narrow: bool
) -> tuple[bytes, dict[str, int], list[str]]:
    """Stores matrices as int4 or int8 where that is exact, and others as fp16; they are widened where they are used.

    What becomes codes is decided before, by who rounds weights to codes and scales (export_rounding.py) or has codes
    (export_codes.py), so that nothing is rounded to less than fp16 here, and no name of a tensor matters.

    Args:
      content: The file.
      given: Codes by name, which alone then are stored as such; None finds codes by their numbers.
      narrow: Whether matrices that are no codes become fp16.

    Returns:
      The file, its bytes of weights by type, and which of the given codes it has.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    (graph,) = model.subgraphs
    added, stored, found = [], {"int4": 0, "int8": 0, "fp16": 0, "fp32": 0}, []
    for place, tensor in enumerate(list(graph.tensors)):
        data = model.buffers[tensor.buffer].data
        if tensor.type != schema.TensorType.FLOAT32 or data is None:
            continue
        weights = np.frombuffer(bytes(data), np.float32).reshape(tensor.shape)
        name, held = None, None
        if storable(weights.shape):
            name, held = (None, _codes(weights)) if given is None else _match(weights, given)
            if held is None and narrow and (np.abs(weights) < np.finfo(np.float16).max).all():
                held = Stored("fp16", weights.astype(np.float16), None, 0)
        if held is None:
            stored["fp32"] += weights.nbytes
            continue
        added += _widening(model, place, held)
        stored[held.kind] += -(-held.values.size // 2) if held.kind == "int4" else held.values.nbytes
        stored["fp32"] += 0 if held.columns is None else held.columns.nbytes
        found += [name] if name else []
    graph.operators = added + _triangles(model) + list(graph.operators)
    return _packed(model), stored, found


def _widening(model: Any, place: int, held: Stored) -> list[Any]:
    """Has a constant be made of what is stored of it; gives the operations."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    (graph,) = model.subgraphs
    whole, kinds, operators = graph.tensors[place], schema.TensorType, schema.BuiltinOperator
    kind = {"int4": kinds.INT4, "int8": kinds.INT8, "fp16": kinds.FLOAT16}[held.kind]
    values = _packed_int4(held.values) if held.kind == "int4" else held.values
    last = _constant(model, kind, held.values.shape, values)
    if held.scale is not None:
        about = graph.tensors[last].quantization = schema.QuantizationParametersT()
        about.scale, about.quantizedDimension = held.scale, held.axis
        about.zeroPoint = np.zeros(held.scale.shape, np.int64)
    steps = [(operators.DEQUANTIZE, 6, [], held.values.shape)]  # version 6 is the first of int4
    if held.row is not None:
        rows = math.prod(whole.shape) // held.row
        steps.append((operators.RESHAPE, 1, [_numbers(model, [rows, -1])], [rows, held.values.size // rows]))
        cut = [_numbers(model, [0, 0]), _numbers(model, [rows, held.row])]
        steps.append((operators.SLICE, 1, cut, [rows, held.row]))
    if list(steps[-1][-1]) != list(whole.shape):
        steps.append((operators.RESHAPE, 1, [_numbers(model, whole.shape)], whole.shape))
    if held.columns is not None:
        columns = _constant(model, kinds.FLOAT32, held.columns.shape, held.columns)
        steps.append((operators.MUL, 1, [columns], whole.shape))
    whole.buffer, made = 0, []
    for number, (operator, version, more, shape) in enumerate(steps, 1):
        operation = schema.OperatorT()
        operation.opcodeIndex, operation.inputs = _operation_code(model, operator, version), [last, *more]
        last = place if number == len(steps) else _tensor(model, kinds.FLOAT32, shape, 0)
        operation.outputs = [last]
        made.append(operation)
    return made


def _tensor(model: Any, kind: int, shape: Any, buffer: int) -> int:
    """Adds a tensor; its place."""
    from ai_edge_litert import schema_py_generated as schema

    (graph,) = model.subgraphs
    tensor = schema.TensorT()
    tensor.type, tensor.shape, tensor.hasRank, tensor.buffer = kind, list(shape), True, buffer
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _constant(model: Any, kind: int, shape: Any, values: Any) -> int:
    """Adds a tensor of numbers; its place."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model.buffers.append(schema.BufferT())
    model.buffers[-1].data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return _tensor(model, kind, shape, len(model.buffers) - 1)


def storable(shape: Any) -> bool:
    """Whether tensors of a shape are stored in fewer bits: of numbers enough, and no vectors, which share no scale."""
    return math.prod(shape) >= LEAST and sum(size > 1 for size in shape) > 1


def _codes(weights: Any) -> Stored | None:
    """Codes and one scale a channel where weights are exactly that; otherwise None."""
    import numpy as np

    for kind, steps in STEPS.items():
        for axis in range(weights.ndim):
            others = tuple(other for other in range(weights.ndim) if other != axis)
            scale = np.maximum(np.abs(weights).max(axis=others, keepdims=True) / steps, np.finfo(np.float32).tiny)
            exact = weights / scale
            codes = np.rint(exact)
            if weights.shape[axis] > 1 and (np.abs(exact - codes) < ON_GRID).all():
                return Stored(kind, codes.astype(np.int8), scale.reshape(-1).astype(np.float32), axis)
    return None


def _match(weights: Any, given: dict[str, Given]) -> tuple[str | None, Stored | None]:
    """The given codes that weights are, by whatever scales, or by the given ones and a factor a column.

    Scales may have been folded in or left to the product; columns have the factors of a norm or of a balance.
    """
    import numpy as np

    turned = weights.swapaxes(-1, -2)
    for name, codes in given.items():
        numbers = codes.groups.astype(np.float32)
        if len(codes.flat(numbers)) != weights.size:
            continue
        for rows in (codes.scale, _factors(codes.grouped(weights).T, numbers.T)):
            if _close(codes.grouped(weights), numbers * rows[:, None]):
                return name, _laid_out(codes, rows, weights.shape)
        one = _factors(turned.reshape(-1, 1), codes.flat(numbers)[:, None])
        if _close(turned.reshape(-1), codes.flat(numbers) * one):
            values = codes.flat(codes.groups).reshape(turned.shape).swapaxes(-1, -2)
            return name, Stored(codes.kind, values, one, 0)
        plain = codes.flat(numbers * codes.scale[:, None]).reshape(-1, weights.shape[-1])
        factor = _factors(weights.reshape(plain.shape), plain)
        if _close(weights.reshape(plain.shape), plain * factor):
            return name, _laid_out(codes, codes.scale, weights.shape)._replace(columns=factor.reshape(1, -1))
    return None, None


def _factors(wide: Any, plain: Any) -> Any:
    """By what each column of a matrix was multiplied, read off its largest number; 1 where all are zero."""
    import numpy as np

    rows, columns = np.abs(plain).argmax(axis=0), np.arange(plain.shape[1])
    largest = plain[rows, columns]
    return np.where(largest == 0, np.float32(1), wide[rows, columns] / np.where(largest == 0, 1, largest))


def _close(wide: Any, other: Any) -> bool:
    import numpy as np

    return bool((np.abs(wide - other) <= SAME * np.abs(wide)).all())


def _laid_out(codes: Given, scale: Any, shape: Any) -> Stored:
    """Codes in the shape of their weight, if one scale holds for all or one axis has one at each place; else groups."""
    if (scale == scale[0]).all():
        return Stored(codes.kind, codes.flat(codes.groups).reshape(shape), scale[:1], 0)
    for axis, size in enumerate(shape):
        if size == len(scale) and math.prod(shape[:axis]) == 1:
            return Stored(codes.kind, codes.flat(codes.groups).reshape(shape), scale, axis)
    filled = codes.row % codes.groups.shape[1]
    return Stored(codes.kind, codes.groups, scale, 0, row=codes.row if filled else None)


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
        ones = [1] * (len(tensor.shape) - 2)
        down = _constant(model, schema.TensorType.INT32, [*ones, rows, 1], np.arange(rows, dtype=np.int32))
        along = _tensor(model, schema.TensorType.INT32, [*ones, 1, rows], graph.tensors[down].buffer)
        tensor.buffer = 0
        operation = schema.OperatorT()
        operation.opcodeIndex = _operation_code(model, schema.BuiltinOperator.GREATER_EQUAL, version=1)
        operation.inputs, operation.outputs = [down, along], [place]
        added.append(operation)
    return added


def _numbers(model: Any, numbers: Any) -> int:
    """Adds a vector of integers; its place."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    return _constant(model, schema.TensorType.INT32, [len(numbers)], np.asarray(numbers, np.int32))


def _operation_code(model: Any, operator: int, version: int) -> int:
    """The place of an operator among those that the model names, to which it is added where it lacks."""
    from ai_edge_litert import schema_py_generated as schema

    for place, code in enumerate(model.operatorCodes):
        if (code.builtinCode, code.version) == (operator, version):
            return place
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
