"""Host memory that loading a sharded Hugging Face checkpoint onto eight CPU devices takes beyond the arrays themselves.

    python benchmarks/hf_loading.py --output benchmarks/results/hf_loading.json     # 4 GB
    python benchmarks/hf_loading.py --size 0.2 --output hf_loading.json# a quick try

Writes a synthetic DeepSeek-V3 checkpoint in bfloat16, loads it in a child process (Linux: the peak of resident memory
is reset when everything is imported), checks every number, and removes the files. Time is given as a ratio to reading
the same files once.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1jax.config import DecoderConfig  # noqa: E402
from r1jax.hf.names import Leaf, layout, nest  # noqa: E402

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
    """Numbers that tell a leaf, its rows and its columns apart, without memory for all of them."""
    rng = np.random.default_rng(list("/".join(leaf.path).encode()))
    row = rng.standard_normal(leaf.shape[-1]).astype(np.float32)
    if len(leaf.shape) == 1:
        return row if leaf.path[-1] == "e_score_correction_bias" else row.astype(ml_dtypes.bfloat16)
    return np.broadcast_to(row.astype(ml_dtypes.bfloat16), leaf.shape)


def status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def load(folder: Path) -> dict:
    """Loads, in a process of its own."""
    import jax

    from r1jax.config import MeshConfig
    from r1jax.hf.load import load_params, read_config
    from r1jax.parallel.mesh import make_mesh

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = make_mesh(MeshConfig(data=1, fsdp=DEVICES))
    config = read_config(folder)
    jax.block_until_ready(jax.device_put(np.zeros(8, ml_dtypes.bfloat16), jax.devices()[0]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = status("VmRSS"), time.perf_counter()
    params = load_params(folder, config, mesh=mesh)
    seconds, peak = time.perf_counter() - began, status("VmHWM") - before
    shards = [s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards]
    for leaf in layout(config):
        array = params
        for part in leaf.path:
            array = array[part]
        index = 0 if len(leaf.shape) == 3 else slice(None)
        assert (np.asarray(array[index]) == values(leaf)[index]).all(), leaf.path
    return {"peak_bytes": peak, "array_bytes": sum(shards), "largest_shard_bytes": max(shards), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="gigabytes of weights")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, help="where the checkpoint is written; the system's folder by default")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.output.write_text(json.dumps(load(args.child)))
        return
    from benchmarks.common import jax_environment
    from r1jax.hf.save import save_params

    config = config_of(args.size)
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        folder, told = Path(name) / "checkpoint", Path(name) / "told.json"
        params = nest({leaf.path: values(leaf) for leaf in layout(config)})
        save_params(folder, config, params, shard_bytes=int(args.size * 1e9 / 4))
        files = sorted(folder.glob("*.safetensors"))
        began = time.perf_counter()
        for file in files:
            with file.open("rb") as opened:
                while opened.read(2**24):
                    pass
        reading = time.perf_counter() - began
        command = [sys.executable, __file__, "--child", str(folder), "--output", str(told)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
        result = json.loads(told.read_text())
        tensors = [math.prod(piece.shape) * 2 for leaf in layout(config) for piece in leaf.pieces]
        leaves = [math.prod(leaf.shape) * 2 for leaf in layout(config)]
        result |= {"checkpoint_bytes": sum(file.stat().st_size for file in files), "files": len(files)}
    beyond = result["peak_bytes"] - result["array_bytes"]
    seconds = result.pop("seconds")
    result |= {
        "devices": DEVICES,
        "largest_tensor_bytes": max(tensors),
        "largest_stacked_bytes": max(leaves),
        "beyond_arrays_bytes": beyond,
        "beyond_arrays_per_largest_tensor": round(beyond / max(tensors), 3),
        "beyond_arrays_per_checkpoint": round(beyond / result["checkpoint_bytes"], 4),
        "time_per_reading_the_files_once": round(seconds / reading, 2),
    }
    told = argparse.Namespace(size=args.size, output=args.output, overrides=[])
    environment = jax_environment(told)
    del environment["arguments"]["overrides"]  # there are none
    args.output.write_text(json.dumps(environment | {"result": result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
