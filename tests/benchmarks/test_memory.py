"""What benchmarks/memory.py measures is what its tables say it is."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.memory import CHANGES, GIB, VARIANTS, compiled_figures, config_of, plot, table
from r1jax.models.r1 import R1
from r1jax.tasks.catalog import TASKS
from r1jax.train.step import TrainState, init_state
from tests.train.experiment import optax_promotes


def shapes(variant):
    config = config_of(variant, tiny=False)
    task = TASKS[config.task.name](config)
    tokens = jnp.zeros((1, 8), jnp.int32)
    batch = {"text": tokens, "text_valid": tokens == 0, "target.bytes": jnp.zeros(1)}
    with optax_promotes():
        return jax.eval_shape(lambda: init_state(config, R1(config.model, task.heads), task, batch))


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_language_model_has_a_billion_weights_and_pure_bf16_halves_its_state():
    wide, narrow = shapes("language/fp32"), shapes("language/pure")
    weights = sum(x.size for x in jax.tree.leaves(wide.params))
    assert 1.02e9 < weights < 1.04e9
    assert size(wide) == pytest.approx(12 * weights, rel=1e-6)
    assert size(narrow) / size(wide) == pytest.approx(0.5, abs=1e-3)


def test_every_variant_is_a_config_of_its_own():
    made = {name: config_of(name, tiny=True) for name in VARIANTS}
    assert len(set(made.values())) == len(VARIANTS)
    assert {made[f"language/{name}"].model.remat for name in CHANGES} == {
        *("none", "attention", "minimal", "full", "offload"),
    }
    assert made["medical/accumulation"].train.accumulation == made["language/accumulation"].train.accumulation == 4


def test_activations_are_temporaries_without_one_gradient():
    memory = SimpleNamespace(
        argument_size_in_bytes=1000, output_size_in_bytes=900, alias_size_in_bytes=880, temp_size_in_bytes=500
    )
    params = {"w": jnp.zeros((10, 5), jnp.bfloat16)}
    state = TrainState(jnp.asarray(0), jnp.zeros(4, jnp.uint32), params, {"m": jnp.zeros((10, 5))}, {})
    found = compiled_figures(SimpleNamespace(memory_analysis=lambda: memory), state)
    assert found["weights"] == 50 and found["state"] == 4 + 16 + 100 + 200
    assert found["activations"] == 500 - 4 * 50 and found["needed"] == 1000 + 900 - 880 + 500


def report():
    row = {"state": GIB, "temporaries": 3 * GIB, "peak": None}
    variants = {
        "language/fp32": row | {"activations": 2 * GIB, "step_seconds": 0.2, "peak": 5 * GIB},
        "language/bf16": row | {"activations": GIB, "step_seconds": 0.1, "peak": 4 * GIB},
        "language/full": row | {"activations": GIB // 5, "step_seconds": 0.12, "peak": 2 * GIB},
        "language/minimal": row | {"activations": GIB, "error": "RESOURCE_EXHAUSTED: ..."},
        "language/offload": {"error": "exit code 1: UserError"},
        "curve/fp32": {"losses": [5.0] + 40 * [2.0], "train_seconds": 9.0},
        "curve/pure": {"losses": [5.0] + 40 * [2.5], "train_seconds": 4.0},
    }
    return {"variants": variants}


def test_table_compares_with_fp32_and_with_bf16():
    rows = {line.split(" | ")[0].strip("| "): line for line in table(report()).splitlines() if line.startswith("| ")}
    assert rows["full"] == "| full | 1.00 | 3.00 | 0.20 | -90% | -80% | 2.00 | -60% | 120.0 | -40% | +20% |"
    assert "does not fit" in rows["minimal"] and "failed" in rows["offload"]
    assert rows["pure"] == "| pure | 5.000 | 2.5000 | +0.5000 | 4 |"


def test_plot_is_small_and_the_same_every_time(tmp_path):
    plot(report(), tmp_path / "a.svg")
    plot(report(), tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and len(drawn) < 100_000 and "pure" in drawn
    plot({"variants": {}}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
