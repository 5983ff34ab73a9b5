"""What a quantized model may be called, and how its loss is measured."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.quantize import quantize
from r1jax.ops.quantized_dot import Scheme
from r1jax.serve.quantize_report import Effect, Layer, Sizes, code_bytes, effect, table, verdict, write_report

LAYERS = [
    Layer("decoder/embed_tokens", "embedding", "int8", 100, 120, "", 0.004, None),
    Layer("head/weight", "linear", "int8:int8", 10, 12, "balanced static", 0.005, 41.5),
]


def accuracy(found, targets):
    return float(np.mean(found["p"] == targets["y"]))


@pytest.mark.parametrize(
    ("shares", "called"),
    [
        ((0.9, 0.8), "int8: 90.0% of its bytes and 80.0% of its FLOPs"),
        ((0.9, 0.4), "int8 weights alone: "),
        ((0.5, 0.9), "not int8: only 50.0% of its bytes"),
    ],
)
def test_a_model_bears_the_name_of_a_type_only_where_most_of_it_is_of_that_type(shares, called):
    assert verdict("int8", Sizes(400, 100, *shares)).startswith(called)


def test_bytes_are_those_of_codes_and_scales():
    x = jnp.ones((6, 40))
    assert code_bytes(quantize(x, "int8"), Scheme("int8")) == 6 * 40 + 6 * 2
    assert code_bytes(quantize(x, "int4", block=20), Scheme("int4")) == 6 * 20 + 12 * 2
    assert code_bytes(quantize(x, "affine8"), Scheme("affine8")) == 6 * 40 + 6 * 4
    served = quantize(x, "int8")._replace(balance=jnp.ones((1, 40)), span=jnp.ones((1, 1)))
    assert code_bytes(served, Scheme("int8", "int8")) == 6 * 40 + 6 * 2 + 40 + 4


def test_the_interval_of_a_change_is_that_of_pairs():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    before = np.where(rng.random(4000) < 0.2, 1 - y, y)
    after = np.where(np.arange(4000) % 100 == 0, 1 - before, before)  # one case in 100 is decided otherwise
    found = effect(accuracy, {"p": before}, {"p": after}, {"y": y}, 300)
    assert found.before == np.mean(before == y) and found.change == pytest.approx(np.mean(after == y) - found.before)
    # 40 of 4000 cases differ, so that the mean of the differences has this standard error.
    error = np.std((after == y).astype(float) - (before == y)) / np.sqrt(4000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert found.low < found.change < found.high and found.cases == 4000


def test_the_same_outcomes_change_nothing():
    y = np.arange(10) % 2
    assert effect(accuracy, {"p": y}, {"p": y}, {"y": y}, 20) == Effect(1.0, 1.0, 0.0, 0.0, 0.0, 10)


def test_the_report_says_all_of_it_as_text_json_and_picture(tmp_path):
    sizes, measured = Sizes(440, 120, 0.9, 0.8), Effect(0.9, 0.89, -0.01, -0.02, 0.001, 50)
    text = table(LAYERS, sizes, "int8", measured)
    assert "3.67 times smaller" in text and "41.5 dB  balanced static" in text
    assert "0.9000 -> 0.8900 on 50 validation cases, change -0.0100 (95 % interval -0.0200 to +0.0010, paired)" in text
    write_report(tmp_path / "report", LAYERS, sizes, "int8", measured, {})
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["score"]["change"] == -0.01 and [x["name"] for x in content["layers"]] == [x.name for x in LAYERS]
    picture = (tmp_path / "report" / "layers.svg").read_text()
    assert all(f"<!-- {layer.name} -->" in picture for layer in LAYERS)  # matplotlib names its texts
