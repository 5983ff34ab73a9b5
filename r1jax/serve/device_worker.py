"""Runs in the Python of an environment with a converter, where nothing of r1jax is installed: one request, one answer.

    python -I device_worker.py REQUEST.json

It is a process of its own because the packages of a converter and of r1jax may exclude each other, and because a
converter may answer what it does not understand with a segmentation fault.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

MISSING = 3
"""Exit code: a package of the converter is not installed."""


def convert(asked: dict[str, Any]) -> dict[str, Any]:
    """Has a converter make the file of a model.

    Args:
      asked: "converter": name of the module beside this one that knows it, and what its `convert` is asked.

    Returns:
      What that says of the file.
    """
    # By its path: were this folder searched, its modules would stand before packages of the same name.
    spec = importlib.util.spec_from_file_location(
        asked["converter"], Path(__file__).with_name(f"{asked['converter']}.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.convert(asked)


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
    from r1jax_edge.artefact import Artefact, InputError

    try:
        artefact = Artefact(folder)
    except InputError as error:
        sys.exit(str(error))
    inputs = dict(np.load(asked["inputs"]))
    count = len(next(iter(inputs.values())))
    found = [artefact.predict({name: values[row] for name, values in inputs.items()}) for row in range(count)]
    np.savez(asked["outputs"], **{name: np.stack([one[name] for one in found]) for name in found[0]})
    return {}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    try:  # a package that is not there says so before minutes are spent
        versions = {name: importlib.metadata.version(name) for name in request["packages"]}
        told = {"convert": convert, "run": run}[request["do"]](request)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    print(json.dumps({"versions": versions, **told}))
