"""Runs in the converter's own Python, where nothing of r1jax is installed: StableHLO -> .tflite, and a trial of it.

    python litert_worker.py REQUEST.json

It is a process of its own because the converter's packages and r1jax's cannot share an environment, and because the
converter answers what it does not understand with a segmentation fault. Its Python interface is not yet stable.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

MISSING = 3
"""Exit code: a package of the converter is not installed."""
PACKAGES = ("litert-converter", "ai-edge-quantizer", "ai-edge-litert")


def convert(asked: dict[str, Any]) -> None:
    """Turns StableHLO text into a .tflite file.

    Args:
      asked: "source", "target" (files), "inputs", "outputs" (names in the order of the program), "int8": whether the
        weights of products and convolutions become int8, one scale an output channel, and "kept": regular expression
        of the names of those that do not.
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
    if asked["int8"]:
        target.write_bytes(_quantized(target, asked["kept"]))


def _quantized(model: Path, kept: str) -> bytes:
    """Dynamic int8: weights are stored as int8, activations become int8 row by row within each product."""
    from ai_edge_quantizer import quantizer, recipe

    engine = quantizer.Quantizer(str(model))
    # LiteRT has no batched product with an int8 left side; here those are of activations and of small weights.
    apart = [
        {"regex": regex, "operation": operation, "algorithm_key": "no_quantize", "op_config": {}}
        for regex, operation in ((".*", "BATCH_MATMUL"), (kept, "*"))
    ]
    engine.load_quantization_recipe([*recipe.dynamic_wi8c_afp32(), *apart])
    return bytes(engine.quantize(None).quantized_model)


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
