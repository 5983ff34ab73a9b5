"""Steps of Muon: against the iteration in float64, whole or divided among devices, and what is refused."""

import functools
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from r1jax.config import Config, TrainConfig
from r1jax.errors import UserError
from r1jax.ops.pipeline import STACKED
from r1jax.parallel import mesh as mesh_module
from r1jax.parallel.mesh import shard_tree
from r1jax.train.muon import COEFFICIENTS, RMS
from r1jax.train.optimizer import make_optimizer, schedule
from r1jax.validation import validate
from tests.train.experiment import Interrupted, make_experiment, optax_promotes

CONFIG = TrainConfig(
    steps=100, warmup_steps=2, learning_rate=2e-3, weight_decay=0.1, clip_norm=1e3, decoder_rate=0.5, muon=(".",)
)
SHAPES = {
    "decoder": {"proj": {"weight": (6, 10)}, "experts": {"gate_up_proj": (3, 8, 4)}, "embed_tokens": (5, 6)},
    "volume": {"first": {"weight": (3, 3, 4, 7)}, "first_norm": {"weight": (4,)}, "wide": {"weight": (9, 5)}},
}


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def run(config, params, gradients, order=(), place=lambda tree: None):
    optimizer = make_optimizer(config, order)
    with optax_promotes():
        held = place(jax.eval_shape(optimizer.init, params))
        state = jax.jit(optimizer.init, out_shardings=held)(params)
        update = jax.jit(optimizer.update, out_shardings=(place(params), held))
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = jax.tree.map(jnp.add, params, updates)
    return params, state


def orthogonal(matrix):
    """Five rounds of the quintic iteration of Jordan et al. (2024), and the size of a step of AdamW."""
    a, b, c = COEFFICIENTS
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x * RMS * max(matrix.shape) ** 0.5


def by_hand(weight, gradients, factor, split):
    """Nesterov's momentum of the mean gradient, corrected for its start, then the step of each matrix."""
    weight, mean, b = np.asarray(weight, float), 0.0, CONFIG.b1
    for step, gradient in enumerate(np.asarray(g, float) for g in gradients):
        mean = b * mean + (1 - b) * gradient
        ahead = b * mean / (1 - b ** (step + 2)) + (1 - b) * gradient / (1 - b ** (step + 1))
        moved = split(ahead, orthogonal)
        weight = weight - factor * float(schedule(CONFIG)(step)) * (moved + CONFIG.weight_decay * weight)
    return weight


def kernel(x, move):
    """Of a convolution: from all that it sees to its outputs."""
    return move(x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)


def test_steps_are_those_of_the_iteration_in_float64():
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3, 4)]
    got, _ = run(CONFIG, params, gradients)
    each = lambda x, move: np.stack([move(one) for one in x])  # noqa: E731
    for part, layer, name, factor, split in (
        ("decoder", "proj", "weight", 0.5, lambda x, move: move(x)),
        ("decoder", "experts", "gate_up_proj", 0.5, each),
        ("volume", "wide", "weight", 1.0, lambda x, move: move(x)),
        ("volume", "first", "weight", 1.0, kernel),
    ):
        own = [gradient[part][layer][name] for gradient in gradients]
        expected = by_hand(params[part][layer][name], own, factor, split)
        np.testing.assert_allclose(got[part][layer][name], expected, rtol=2e-5, atol=2e-6, err_msg=layer)


def test_steps_are_about_as_large_as_those_of_adamw():
    shapes = {"volume": {"a": {"weight": (48, 96)}, "b": {"weight": (3, 3, 32, 48)}}}
    params, gradient = draw(0, shapes), draw(1, shapes)
    got, _ = run(replace(CONFIG, warmup_steps=0, weight_decay=0.0), params, [gradient])
    for name in ("a", "b"):
        step = (got["volume"][name]["weight"] - params["volume"][name]["weight"]) / CONFIG.learning_rate
        assert 0.14 < float(jnp.sqrt(jnp.mean(step**2))) < 0.24


def test_norms_embeddings_and_what_is_not_chosen_stay_with_adamw():
    params, gradients = draw(0), [draw(seed) for seed in (1, 2)]
    plain, _ = run(replace(CONFIG, muon=()), params, gradients)
    got, state = run(replace(CONFIG, muon=("^volume/",)), params, gradients)
    for part, layer in (("volume", "first_norm"), ("decoder", "embed_tokens"), ("decoder", "proj")):
        jax.tree.map(np.testing.assert_array_equal, got[part][layer], plain[part][layer])
    assert not np.array_equal(got["volume"]["first"]["weight"], plain["volume"]["first"]["weight"])
    # One number a weight where AdamW keeps two, and nothing that is constant.
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    once = [(3, 3, 4, 7), (9, 5)]
    assert kept == sorted([*once, *2 * [(4,), (5, 6), (6, 10), (3, 8, 4)]])


def test_layers_that_are_stacked_move_as_they_do_alone():
    shapes = {"mlp": {"experts": {"down_proj": (3, 4, 6)}}, "o_proj": {"weight": (6, 10)}}
    alone = {"decoder": {f"layers_{i}": draw(i, shapes) for i in range(2)}}
    gradients = {"decoder": {f"layers_{i}": draw(5 + i, shapes) for i in range(2)}}
    stack = lambda tree: {"decoder": {STACKED: jax.tree.map(lambda *x: jnp.stack(x), *tree["decoder"].values())}}  # noqa: E731
    apart, _ = run(CONFIG, alone, [gradients])
    together, _ = run(CONFIG, stack(alone), [stack(gradients)], (0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, stack(apart))


def test_divided_among_devices_nothing_changes_and_the_momentum_stays_divided(monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 1)
    axes = {"data": 1, "fsdp": 4, "expert": 2}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    shapes = {
        "decoder": {
            "layers_0": {
                "mlp": {"experts": {"gate_up_proj": (4, 32, 16)}},
                "self_attn": {"o_proj": {"weight": (64, 32)}},
            }
        },
        "volume": {"stage_0_block_0": {"first": {"weight": (3, 3, 8, 64)}}},
    }
    params, gradients = draw(0, shapes), [draw(1, shapes), draw(2, shapes)]
    whole, _ = run(CONFIG, params, gradients)
    place = functools.partial(shard_tree, mesh)
    put = lambda tree: jax.device_put(tree, place(tree))  # noqa: E731
    divided, state = run(CONFIG, put(params), [put(gradient) for gradient in gradients], place=place)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), divided, whole)
    kept = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.ndim > 1}
    assert kept == {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(divided)}
    assert sum(any(spec) for spec in kept.values()) >= 2


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    """With moments in bf16, which are rounded by chance, and a checkpoint between."""
    flags = ("--train.muon", "^volume/", "o_proj", "--train.moments", "bfloat16", "--train.steps", "10")
    tiny = make_experiment(*flags, "--train.eval_every", "10")
    straight, *_ = tiny.train(tmp_path / "straight")
    _, _, stopped = tiny.train(tmp_path / "stopped", step=Interrupted(tiny.step, 5, signal.SIGTERM))
    resumed, said, _ = tiny.train(tmp_path / "stopped")
    assert stopped and said == [f"goes on from {tmp_path / 'stopped' / 'checkpoints' / '00000005'}"]
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    momentum = optax.tree.get_all_with_path(straight.optimizer, "mu")
    assert any(leaf.dtype == jnp.bfloat16 for _, tree in momentum for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"muon": ("_norm",)},
            "train.muon: no trained matrix follows the pattern '_norm'; matrices are called",
        ),
        ({"muon": ("embed",)}, "train.muon: no trained matrix follows the pattern 'embed'"),
        ({"muon": ("proj",), "sgd": ("decoder",)}, "train.sgd and train.muon both choose decoder/"),
    ],
)
def test_patterns_that_choose_nothing_or_twice_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        make_optimizer(replace(CONFIG, **changes)).init(draw(0))


def test_a_pattern_that_cannot_be_read_or_that_parts_a_pipeline_is_refused():
    with pytest.raises(UserError, match=r"train.muon is \('\(',\), but it must be a list of regular expressions"):
        validate(Config(train=TrainConfig(muon=("(",))))
    tree = {"decoder": {STACKED: {"weight": jnp.ones((2, 3, 4))}}}
    with pytest.raises(UserError, match="train.muon: the pattern 'layers_1' chooses decoder/layers_1/weight and not"):
        make_optimizer(replace(CONFIG, muon=("layers_1",)), (0, 1)).init(tree)
