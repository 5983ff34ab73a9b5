"""Runs in the converter's own Python, where nothing of r1jax is installed: StableHLO -> .tflite, and a trial of it.

    python litert_worker.py REQUEST.json

It is a process of its own because the converter's packages and r1jax's cannot share an environment, and because the
converter answers what it does not understand with a segmentation fault. Its Python interface is not yet stable.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

LEAST = 256
"""Numbers from which a constant that is left in fp32 is stored in fewer bits: below, its scales and place cost more."""
MISSING = 3
"""Exit code: a package of the converter is not installed."""
PACKAGES = ("litert-converter", "ai-edge-quantizer", "ai-edge-litert")


def convert(asked: dict[str, Any]) -> None:
    """Turns StableHLO text into a .tflite file.

    Args:
      asked: "source", "target" (files), "inputs", "outputs" (names in the order of the program), "int8": whether
        products compute in int8 but for those whose names match "kept", a regular expression, and "fine": of the
        constants that are stored as fp16, all others being int8, one scale a channel; None leaves all in fp32.
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
    if asked["fine"] is not None:
        content = _quantized(target, asked["kept"]) if asked["int8"] else bytearray(target.read_bytes())
        target.write_bytes(_narrowed(content, asked["fine"]))


def _quantized(model: Path, kept: str) -> bytearray:
    """Dynamic int8: weights are stored as int8, activations become int8 row by row within each product."""
    from ai_edge_quantizer import quantizer, recipe

    engine = quantizer.Quantizer(str(model))
    # LiteRT has no batched product with an int8 left side; here those are of activations and of small weights.
    apart = [
        {"regex": regex, "operation": operation, "algorithm_key": "no_quantize", "op_config": {}}
        for regex, operation in ((".*", "BATCH_MATMUL"), (kept, "*"))
    ]
    engine.load_quantization_recipe([*recipe.dynamic_wi8c_afp32(), *apart])
    return bytearray(engine.quantize(None).quantized_model)


def _narrowed(content: bytearray, fine: str) -> bytes:
    """Stores what is fp32 still (embeddings, layers that compute in fp32) in fewer bits, widened where it is used."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    (graph,) = model.subgraphs
    widen = schema.OperatorCodeT()
    widen.builtinCode = widen.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    widen.version = 5  # the first that takes one scale a channel
    model.operatorCodes.append(widen)
    added = []
    for place, tensor in enumerate(list(graph.tensors)):
        data = model.buffers[tensor.buffer].data
        if tensor.type != schema.TensorType.FLOAT32 or data is None or len(data) < 4 * LEAST:
            continue
        weights = np.frombuffer(bytes(data), np.float32).reshape(tensor.shape)
        matrix = sum(size > 1 for size in weights.shape) > 1  # a vector's numbers share no scale
        if not matrix or not (np.abs(weights) < np.finfo(np.float16).max).all():
            continue
        stored = schema.TensorT()
        stored.shape, stored.hasRank, stored.buffer = tensor.shape, tensor.hasRank, len(model.buffers)
        if re.fullmatch(fine, tensor.name.decode()):
            stored.type, codes = schema.TensorType.FLOAT16, weights.astype(np.float16)
        else:
            codes, scale, axis = _rounded(weights)
            stored.type, stored.quantization = schema.TensorType.INT8, schema.QuantizationParametersT()
            stored.quantization.scale, stored.quantization.quantizedDimension = scale, axis
            stored.quantization.zeroPoint = np.zeros(scale.shape, np.int64)
        model.buffers.append(schema.BufferT())
        model.buffers[-1].data = codes.reshape(-1).view(np.uint8)
        tensor.buffer = 0
        operation = schema.OperatorT()
        operation.opcodeIndex, operation.inputs = len(model.operatorCodes) - 1, [len(graph.tensors)]
        operation.outputs = [place]
        graph.tensors.append(stored)
        added.append(operation)
    graph.operators = added + list(graph.operators)
    return _packed(model)


def _rounded(weights: Any) -> tuple[Any, Any, int]:
    """Codes of -127 to 127, one scale along the first axis that is longer than 1, and that axis."""
    import numpy as np

    axis = next((axis for axis, size in enumerate(weights.shape) if size > 1), 0)
    others = tuple(other for other in range(weights.ndim) if other != axis)
    scale = np.maximum(np.abs(weights).max(axis=others, keepdims=True) / 127, np.finfo(np.float32).tiny)
    return np.rint(weights / scale).astype(np.int8), scale.reshape(-1).astype(np.float32), axis


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
        operation.inputs, operation.outputs = (np.asarray(x, np.int32) for x in (operation.inputs, operation.outputs))
    for tensor in graph.tensors:
        tensor.name, tensor.shape = None, np.asarray(tensor.shape, np.int32)
        about = tensor.quantization
        if about is None or about.scale is None:
            tensor.quantization = None
        else:
            about.zeroPoint = np.asarray(about.zeroPoint, np.int64)
    builder = Sharing()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def run(asked: dict[str, Any]) -> None:
    """Has the exported folder's own runner predict cases.

    Args:
      asked: "folder", "inputs" (.npz file, cases first) and "outputs" (.npz file to write).
    """
    import numpy as np

    folder = Path(asked["folder"])
    sys.path.insert(0, str(folder / asked["runner"]))
    from r1jax_edge.artefact import Artefact

    artefact, inputs = Artefact(folder), dict(np.load(asked["inputs"]))
    count = len(next(iter(inputs.values())))
    found = [artefact.predict({name: values[row] for name, values in inputs.items()}) for row in range(count)]
    np.savez(asked["outputs"], **{name: np.stack([one[name] for one in found]) for name in found[0]})


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        {"convert": convert, "run": run}[request["do"]](request)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    print(json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}))
