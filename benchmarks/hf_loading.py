"""Host memory and reads of loading a sharded Hugging Face checkpoint onto eight CPU devices, and of writing one.

    python benchmarks/hf_loading.py --output benchmarks/results/hf_loading.json     # 4 GB; needs 14 GB of disk
    python benchmarks/hf_loading.py --size 0.2 --output hf_loading.json             # a quick try

Writes a synthetic DeepSeek-V3 checkpoint of random bfloat16 numbers, and does each of these in
child processes of their own (Linux: the peak of resident memory is reset when everything is imported): loads it and
checks every number; loads it with transformers, where that is installed; `r1jax hf import`; `r1jax hf export`. Figures
are medians. Of read() calls all bytes count; transformers maps files into memory instead, which leaves no such trace.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1jax.config import DecoderConfig  # noqa: E402
from r1jax.hf.files import open_folder  # noqa: E402
from r1jax.hf.names import ROUTER_BIAS, Leaf, layout, nest  # noqa: E402

DEVICES = 8


def config_of(gigabytes: float) -> DecoderConfig:
    """Widths of a small V3, and as many layers as make up the size."""
    scale = 1 if gigabytes >= 1 else 4

    def decoder(layers: int) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=32768 // scale,
            hidden_size=2048 // scale,
            num_hidden_layers=layers,
            num_attention_heads=16,
            q_lora_rank=768 // scale,
            kv_lora_rank=512 // scale,
            qk_nope_head_dim=128 // scale,
            qk_rope_head_dim=64 // scale,
            v_head_dim=128 // scale,
            intermediate_size=8192 // scale,
            moe_intermediate_size=1024 // scale,
            n_routed_experts=32,
            num_nextn_predict_layers=0,
        )

    layers = 2
    while sum(math.prod(leaf.shape) for leaf in layout(decoder(layers))) * 2 < gigabytes * 1e9:
        layers += 1
    return decoder(layers)


def values(leaf: Leaf) -> np.ndarray:
    """Random numbers of the leaf's own, between 2**-14 and 1; no compression makes them smaller."""
    rng = np.random.default_rng(zlib.crc32("/".join(leaf.path).encode()))
    numbers = rng.integers(0x3880, 0x3F80, leaf.shape, np.uint16).view(ml_dtypes.bfloat16)
    return numbers.astype(np.float32) if leaf.path[-1] == ROUTER_BIAS else numbers


def status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What a function takes: peak of resident memory above what was there, bytes of read() calls, seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, read, began = status("VmRSS"), bytes_read(), time.perf_counter()
    result = run()
    told = {"peak_bytes": status("VmHWM") - before, "bytes_read": bytes_read() - read}
    return told | {"seconds": time.perf_counter() - began}, result


def bytes_read() -> int:
    """Bytes of all read() calls of this process so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def start_devices() -> None:
    """Eight CPU devices that have been used."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.block_until_ready(jax.device_put(np.zeros(8, ml_dtypes.bfloat16), jax.devices()[0]))


def load(folder: Path) -> dict[str, float]:
    """Loads with r1jax, and checks every number."""
    import jax

    from r1jax.config import MeshConfig
    from r1jax.hf.load import load_params, read_config
    from r1jax.parallel.mesh import make_mesh

    start_devices()
    mesh, config = make_mesh(MeshConfig(data=1, fsdp=DEVICES)), read_config(folder)
    told, params = measured(lambda: load_params(folder, config, mesh=mesh))
    shards = [s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards]
    for leaf in layout(config):
        array, expected = params, values(leaf)
        for part in leaf.path:
            array = array[part]
        for shard in array.addressable_shards:
            assert (np.asarray(shard.data) == expected[shard.index]).all(), leaf.path
    return told | {"array_bytes": sum(shards), "largest_shard_bytes": max(shards)}


def load_with_transformers(folder: Path) -> dict[str, float]:
    """Loads with transformers, as its users do, and touches every page."""
    import torch
    import transformers

    def run() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for value in model.parameters():
            value.sum()
        return model

    told, model = measured(run)
    del told["bytes_read"]
    return told | {"array_bytes": sum(value.nbytes for value in model.parameters())}


def command(*words: str) -> dict[str, float]:
    """Runs an `r1jax` command."""
    from r1jax.__main__ import dispatch

    start_devices()
    return measured(lambda: dispatch(list(words)))[0]


def child(job: str, folder: Path) -> dict[str, float]:
    """Does one job in this process; `folder` holds all that the jobs read and write."""
    source, imported = folder / "checkpoint", folder / "imported"
    jobs = {
        "load": lambda: load(source),
        "transformers": lambda: load_with_transformers(source),
        "import": lambda: command("hf", "import", str(source), str(imported)),
        "export": lambda: command("hf", "export", str(imported), str(folder / "exported")),
    }
    return jobs[job]()


def medians(job: str, folder: Path, repeats: int) -> dict[str, float]:
    """Medians of a job in processes of its own; what one leaves, the next one writes anew."""
    found, told = [], folder / "told.json"
    for _ in range(repeats):
        shutil.rmtree(folder / f"{job}ed", ignore_errors=True)
        words = [sys.executable, __file__, "--job", job, "--child", str(folder), "--output", str(told)]
        subprocess.run(words, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}, stdout=sys.stderr)
        found.append(json.loads(told.read_text()))
    return {name: float(np.median([row[name] for row in found])) for name in found[0]}


def compare(folder: Path) -> None:
    """Checks that what was exported is what was imported."""
    source, exported = (open_folder(folder / name) for name in ("checkpoint", "exported"))
    assert source.keys() == exported.keys()
    for name, tensor in source.items():
        both = (tensor.read_rows(0, tensor.shape[0]), exported[name].read_rows(0, tensor.shape[0]))
        assert both[0].tobytes() == both[1].tobytes(), name


def seconds_to_read(folder: Path) -> float:
    """Seconds of reading the files once."""
    began = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
    return time.perf_counter() - began


def table(report: dict) -> str:
    """The result in Markdown."""
    lines = [
        "| | arrays, MB | beyond them, MB | of the checkpoint | bytes read / bytes of the files |",
        "|---|---|---|---|---|",
    ]
    names = {"load": "r1jax, loading onto 8 devices", "transformers": "transformers, `from_pretrained`"}
    names |= {"import": "`r1jax hf import`", "export": "`r1jax hf export`"}
    result = report["result"]
    for job, name in names.items():
        row = result["jobs"].get(job)
        if row is None:
            lines.append(f"| {name} | not installed | | | |")
            continue
        read = f"{row['read_per_file_bytes']:.2f}" if "read_per_file_bytes" in row else "mapped"
        lines.append(
            f"| {name} | {row['array_bytes'] / 1e6:,.0f} | {row['beyond_arrays_bytes'] / 1e6:,.0f} | "
            f"{row['beyond_arrays_bytes'] / result['checkpoint_bytes']:.1%} | {read} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="gigabytes of weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, help="where the files are written; the system's folder by default")
    parser.add_argument("--jobs", nargs="+", default=["load", "transformers", "import", "export"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.output.write_text(json.dumps(child(args.job, args.child)))
        return
    from benchmarks.common import jax_environment
    from r1jax.hf.save import save_params
    from r1jax.train.lazy import LazyArray

    config, began = config_of(args.size), time.perf_counter()
    leaves = layout(config)
    jobs = [job for job in args.jobs if job != "transformers" or importlib.util.find_spec("transformers")]
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        folder = Path(name)
        source = folder / "checkpoint"
        kinds = {leaf.path: np.float32 if leaf.path[-1] == ROUTER_BIAS else ml_dtypes.bfloat16 for leaf in leaves}
        params = {x.path: LazyArray(x.shape, np.dtype(kinds[x.path]), partial(values, x)) for x in leaves}
        save_params(source, config, nest(params), shard_bytes=int(args.size * 1e9 / 4))
        files = sorted(source.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        reading = seconds_to_read(source)
        found = {job: medians(job, folder, args.repeats) for job in jobs}
        if "export" in jobs:
            compare(folder)
    arrays = sum(math.prod(leaf.shape) * np.dtype(kinds[leaf.path]).itemsize for leaf in leaves)
    for job, row in found.items():
        row.setdefault("array_bytes", 0 if job == "export" else arrays)  # an export needs no array as a whole
        row["beyond_arrays_bytes"] = row["peak_bytes"] - row["array_bytes"]
        if "bytes_read" in row:
            row["read_per_file_bytes"] = round(row["bytes_read"] / size, 3)
        row["time_per_reading_the_files_once"] = round(row.pop("seconds") / reading, 2)
    result = {
        "devices": DEVICES,
        "checkpoint_bytes": size,
        "files": len(files),
        "largest_tensor_bytes": max(math.prod(piece.shape) * 2 for leaf in leaves for piece in leaf.pieces),
        "largest_stacked_bytes": max(math.prod(leaf.shape) * 2 for leaf in leaves),
        "jobs": found,
    }
    told = argparse.Namespace(size=args.size, repeats=args.repeats, output=args.output, overrides=[])
    environment = jax_environment(told)
    del environment["arguments"]["overrides"]  # there are none
    folder = r" --workdir[ =]('[^']*'|\S+)"  # of this machine
    environment["command"] = re.sub(folder, "", environment["command"])
    peer = [package for package in ("torch", "transformers") if "transformers" in jobs]
    environment["versions"] |= {name: importlib.metadata.version(name) for name in ("orbax-checkpoint", *peer)}
    report = environment | {"seconds": time.perf_counter() - began, "result": result}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
