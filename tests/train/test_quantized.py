"""The format of quantized weights, and a run that begins in floats."""

import functools
import json
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.ops.quantize import Quantized, quantize
from r1jax.train import quantized
from r1jax.train.quantized import is_codes, read_codes, write_codes
from r1jax.train.ranges import split_ranges
from r1jax.train.step import NO_LIMIT
from tests.train.experiment import make_experiment

RNG = np.random.default_rng(0)


@pytest.fixture
def tree():
    """Codes of every kind beside what no rule names."""

    def codes(kind, *shape, block=None):
        x = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
        return quantize(x, kind, block=block, scale_dtype=jnp.bfloat16)

    power = jnp.asarray(2.0 ** RNG.integers(-12, 13, (1, 40)), jnp.bfloat16)
    return {
        "decoder": {
            "embed_tokens": codes("int8", 32, 48),
            "balanced": codes("int8", 8, 40)._replace(balance=power),
            "static": codes("int4", 8, 40)._replace(balance=power, span=jnp.full((1, 1), 1.7)),
            "mlp": {"up": {"weight": codes("int4", 3, 5, 7, block=3)}, "experts": codes("fp8", 4, 6, 64)},
            "norm": {"weight": jnp.asarray(RNG.standard_normal(48), jnp.float32)},
        },
        "table": {"weight": codes("affine8", 3, 4, 6)},
    }


KINDS = {
    "decoder/embed_tokens": "int8",
    "decoder/balanced": "int8",
    "decoder/static": "int4",
    "decoder/mlp/up/weight": "int4",
    "decoder/mlp/experts": "fp8",
    "table/weight": "affine8",
}


def test_what_is_written_is_read_bit_for_bit(tree, tmp_path):
    write_codes(tmp_path / "q", tree, KINDS)
    read, kinds = read_codes(tmp_path / "q")
    assert kinds == KINDS
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_four_bits_take_half_a_byte_and_scales_two(tmp_path):
    x = jnp.asarray(RNG.uniform(-1, 1, (256, 512)), jnp.float32)  # codes are evenly used, so that nothing deflates
    write_codes(tmp_path / "q", {"w": quantize(x, "int4", block=128, scale_dtype=jnp.bfloat16)}, {"w": "int4"})
    assert (tmp_path / "q" / "weights.bin").stat().st_size <= 256 * 512 / 2 + 256 * 4 * 2


def test_parts_of_small_models_are_packed_and_long_ones_deflated(tmp_path, monkeypatch):
    uneven = np.clip(RNG.normal(0, 9, (64, 512)).round(), -127, 127).astype(np.int8)  # 5.2 bits a code
    scales = RNG.uniform(0.001, 0.002, (64, 1)).astype(ml_dtypes.bfloat16)
    sizes = {}
    for name, short in (("packed", 2**20), ("deflated", 0)):
        monkeypatch.setattr(quantized, "SHORT", short)
        write_codes(tmp_path / name, {"w": Quantized(uneven, scales)}, {"w": "int8"})
        read, _ = read_codes(tmp_path / name)
        np.testing.assert_array_equal(read["w"].values, uneven)
        np.testing.assert_array_equal(read["w"].scale, scales)
        sizes[name] = (tmp_path / name / "weights.bin").stat().st_size
    assert 0.60 * uneven.size < sizes["packed"] < 0.98 * sizes["deflated"] < 0.98 * uneven.size


def test_versions_before_are_read_and_later_ones_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "SHORT", 0)  # they knew no other form than deflated
    write_codes(tmp_path / "q", tree, KINDS)
    index = json.loads(zlib.decompress((tmp_path / "q" / "index.zlib").read_bytes()))
    (tmp_path / "q" / "index.zlib").write_bytes(zlib.compress(json.dumps(index | {"version": 4}).encode()))
    with pytest.raises(UserError, match="version 4 .*reads versions up to 3: quantize the checkpoint again"):
        read_codes(tmp_path / "q")
    (tmp_path / "q" / "index.zlib").unlink()
    for version in (1, 2):
        (tmp_path / "q" / "index.json").write_text(json.dumps(index | {"version": version}))
        assert read_codes(tmp_path / "q")[1] == KINDS
    assert not is_codes(tree["decoder"]["norm"]["weight"])


@pytest.mark.slow
def test_a_run_begins_in_floats_and_rounds_from_its_start():
    """The first half has the loss of the model of floats, the second that of rounded products, and all weights move."""
    flags = (
        "--quant",
        ".=int4:int8/running",
        "--train.quant_start",
        "0.5",
        "--model.dropout",
        "0.0",
        "--train.warmup_steps",
        "0",
    )
    run = make_experiment(*flags, file="tiny_language.py")
    batch, state, rules = run.batches(1)[0], run.init(), run.config.model.quant

    @functools.partial(jax.jit, static_argnums=0)
    def loss(quant, step, batch):
        model = run.model.clone(config=replace(run.config.model, quant=quant))
        inputs, targets = run.task.prepare(batch)
        output = model.apply({"params": run.fresh.params}, inputs, language=True)
        return run.task.loss(output, inputs, targets, step / run.config.train.steps)[0]

    for step, quant in ((0, ()), (4, rules)):
        share = jnp.float32(step)
        state, metrics = run.step(run.init()._replace(step=jnp.asarray(step, jnp.int32)), batch, NO_LIMIT)
        np.testing.assert_allclose(metrics["loss"], loss(quant, share, batch), rtol=1e-6)
        assert abs(float(metrics["loss"] - loss(rules if step == 0 else (), share, batch))) > 1e-4
        assert all((x > 0) == (step > 0) for x in jax.tree.leaves(split_ranges(state.params)[0]))
    pairs = zip(jax.tree_util.tree_leaves_with_path(run.fresh.params), jax.tree.leaves(state.params), strict=True)
    still = [jax.tree_util.keystr(path) for (path, old), new in pairs if np.array_equal(old, new)]
    assert not [name for name in still if "bias" not in name], "no gradient passed the rounding to these weights"


def test_a_rule_that_nothing_follows_ends_a_run_before_it_is_compiled():
    with pytest.raises(UserError, match=r"'o_prj'.*did you mean"):
        make_experiment("--quant", "o_prj=int8", file="tiny_language.py")


def test_a_running_range_for_experts_alone_ends_a_run_before_it_is_compiled():
    with pytest.raises(UserError, match=r"'mlp/experts' can have a running range .*leave out /running"):
        make_experiment("--quant", "mlp/experts=int8:int8/running", "int8", file="tiny_language.py")
