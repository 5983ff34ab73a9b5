"""PyTorch's peer of a training step is the model of transformers, with the same gradients."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks.h100_train import write_start  # noqa: E402
from benchmarks.h100_train_torch import reference, transformers  # noqa: E402


def test_losses_and_gradients_of_both_peers_agree(tmp_path):
    write_start("V2-Lite-4L", "tiny", tmp_path)
    folder = tmp_path / "V2-Lite-4L"
    c = json.loads((folder / "config.json").read_text())
    c["rope_theta"] = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    tokens = torch.tensor(np.load(folder / "batch.npz")["tokens"][:2].astype(np.int64))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    found = {}
    for maker in (reference, transformers):
        weights, loss_of = maker(folder, c, "cpu")
        loss = loss_of(tokens, count)
        loss.backward()
        gradients = [weights[name].grad for name in ("lm_head.weight", "model.layers.1.mlp.gate.weight")]
        found[maker] = loss.item(), [g / g.norm() for g in gradients]
    (ours, mine), (theirs, other) = found.values()
    assert ours == pytest.approx(theirs, rel=1e-3)  # products in bf16 on both sides
    assert [(a * b).sum().item() for a, b in zip(mine, other, strict=True)] == pytest.approx([1.0, 1.0], abs=2e-2)
