"""Makes deepseek_v2_tiny.npz: a very small random DeepSeek-V2 checkpoint and what Hugging Face computes with it.

    pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=. python tests/hf/make_fixture.py tests/hf/deepseek_v2_tiny.npz

The tests need neither package, only the file: config (JSON), weight/<name on disk>, and the arrays of
`tests.hf.reference.make`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from tests.hf import reference

CHANGE = {"vocab_size": 40, "hidden_size": 20, "intermediate_size": 24, "moe_intermediate_size": 8}
CHANGE |= {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "q_lora_rank": None, "kv_lora_rank": 12}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        arrays = reference.make(folder, "v2", padding=3, length=10, **CHANGE)
        weights = load_file(Path(folder) / "model.safetensors")
        arrays["config"] = np.array(json.dumps(reference.published(folder)))
    arrays |= {f"weight/{name}": value for name, value in weights.items()}
    np.savez_compressed(output, **arrays)
    print(f"{output}: {output.stat().st_size} bytes, standard deviation of the logits {arrays['logits'].std():.2f}")


if __name__ == "__main__":
    main()
