"""One way to predict a case, in a process of its own; the parent asks by lines. Needs only what that way needs."""

import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Predict = Callable[[], Any]


def litert(folder: str, inputs: str) -> tuple[Predict, list[str]]:
    """What `r1jax export --to litert` wrote, by the runner beside it."""
    sys.path.insert(0, str(Path(folder) / "r1jax_edge.pyz"))
    import numpy as np
    from r1jax_edge.artefact import Artefact

    artefact, case = Artefact(Path(folder)), {name: x[0] for name, x in np.load(inputs).items()}
    return lambda: artefact.predict(case), ["ai-edge-litert"]


def iree(folder: str, inputs: str) -> tuple[Predict, list[str]]:
    """What `r1jax export --to iree` wrote, likewise."""
    return litert(folder, inputs)[0], ["iree-base-runtime"]


def exported(folder: str, inputs: str) -> tuple[Predict, list[str]]:
    """What `r1jax export --to jax` wrote, without r1jax."""
    import jax
    import numpy as np

    card = json.loads((Path(folder) / "card.json").read_text())
    run = jax.jit(jax.export.deserialize(bytearray((Path(folder) / card["file"]).read_bytes())).call)
    case = dict(np.load(inputs))
    return lambda: jax.device_get(run(case)), ["jax", "jaxlib", "flatbuffers"]


def checkpoint(folder: str, inputs: str) -> tuple[Predict, list[str]]:
    """The checkpoint itself: r1jax, the model as it is trained, compiled for one case."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import jax
    import numpy as np

    from r1jax.config import MeshConfig
    from r1jax.models.r1 import R1
    from r1jax.parallel.mesh import make_mesh
    from r1jax.serve.evaluate import restore_served
    from r1jax.serve.export_medical import exported_graph
    from r1jax.tasks.catalog import TASKS
    from r1jax.train.checkpoints import find_checkpoint

    found = find_checkpoint(Path(folder))
    config = found.config()
    task, mesh = TASKS[config.task.name](config), make_mesh(MeshConfig())
    model = R1(config.model, task.heads)
    params = restore_served(found, config, model, task, mesh, task.source("test"))
    run, case = jax.jit(exported_graph(task, model, params, {"both": {}})), dict(np.load(inputs))
    return lambda: jax.device_get(run(case)), ["jax", "jaxlib", "flax", "orbax-checkpoint", "optax"]


def installed_bytes(names: list[str]) -> int:
    """Bytes on disk of packages and all that they require."""
    seen: set[str] = set()
    waiting, total = list(names), 0
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform only
        files = [package.locate_file(file) for file in package.files or ()]
        total += sum(Path(str(file)).stat().st_size for file in files if Path(str(file)).is_file())
        needs = [line for line in package.requires or () if "extra ==" not in line]
        waiting += [re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in needs]
    return total


def main(ways: dict[str, Callable[[str, str], tuple[Predict, list[str]]]] | None = None) -> None:
    """Predicts once, says so, then as often as each line asks; at the end says what it took."""
    way, folder, inputs, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    ways = ways or {"litert": litert, "iree": iree, "exported": exported, "checkpoint": checkpoint}
    predict, packages = ways[way](folder, inputs)
    predict()
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            predict()
            times.append(1e3 * (time.perf_counter() - began))
        print(json.dumps(times), flush=True)
    # Not getrusage, which counts what the parent had before this program was loaded.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(json.dumps({"peak_bytes": peak, "runtime_bytes": installed_bytes(packages)}), flush=True)


if __name__ == "__main__":
    main()
