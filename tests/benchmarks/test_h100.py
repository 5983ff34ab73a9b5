"""The page's table of a GPU's kernels, from rows of two runs."""

import pytest

from benchmarks.h100 import losses_apart, markdown, with_backward
from benchmarks.h100_kernels import cases
from benchmarks.h100_train import cases as steps

FORWARD = {"name": "attention-forward cuDNN causal", "run": 1, "ms": 1.0, "iqr_ms": 0.2, "tflops": 500.0, "error": 1e-3}
BOTH = {"name": "attention-both cuDNN causal", "run": 1, "ms": 3.0, "iqr_ms": 0.2, "tflops": 400.0, "error": 1e-3}


def test_every_product_of_the_routed_experts_and_two_models_are_there():
    for product in ("forward", "input", "weight"):
        assert {f"grouped-{product} ours", f"grouped-{product} cuBLAS, equal"} <= cases().keys()
    assert {"attention-both ours causal", "loss ours", "experts ours, both"} <= cases().keys()
    weights = [make().model.decoder for name, make in steps("full").items() if name.startswith("train dense")]
    assert weights and all(d.first_k_dense_replace == d.num_hidden_layers for d in weights)


def test_backward_pass_is_what_the_forward_pass_leaves():
    alone = with_backward([FORWARD, BOTH])[-1]
    assert alone["name"] == "attention-backward cuDNN causal"
    assert alone["ms"] == 2.0 and alone["tflops"] == pytest.approx((3 * 400 - 500) / 2)
    assert with_backward([FORWARD, BOTH | {"run": 2}]) == [FORWARD, BOTH | {"run": 2}]


def test_shares_are_of_the_matmul_of_the_same_run():
    ceilings = [
        {"name": "ceiling matmul", "run": n, "ms": 1.0, "tflops": rate, "error": None}
        for n, rate in ((1, 800), (2, 500))
    ]
    rows = [*ceilings, FORWARD, FORWARD | {"name": "other", "run": 2}, {"name": "broken", "refused": "no"}]
    lines = markdown({"results": rows, "note": "Two runs."}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]
    assert [row[0] for row in cells] == ["ceiling matmul"] * 2 + [FORWARD["name"], "other"]
    assert [row[5] for row in cells] == ["100%", "100%", "62%", "100%"]
    assert cells[2][2] == "1.000 ± 0.100" and cells[2][7] == "500 and 650 TFLOP/s" and not cells[3][7]
    assert lines[-1] == "Two runs."


def test_a_peers_losses_are_compared_with_those_of_ours_on_the_same_model():
    def row(name: str, losses: list[float]) -> dict:
        return {"name": f"train {name}", "losses": losses}

    rows = [row("a, ours", [4.0, 2.0, 1.0]), row("a, torch", [4.0, 2.1, 1.0]), row("b, torch", [9.0])]
    assert [losses_apart(r, rows) for r in rows] == [None, pytest.approx(0.05), None]
    later = [row("a, ours", [4.2, 2.1, 1.0]) | {"run": 2}, row("a, int8", [4.2, 2.31, 1.0]) | {"run": 2}]
    assert losses_apart(later[1], [*rows, *later]) == pytest.approx(0.1)  # beside its own run
