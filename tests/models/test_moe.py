"""The router's choice, the balance loss, the bias-only balancing rule and the mixture, against plain loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig
from r1jax.models.moe import Experts, MoE, dense_mixtures, expert_shares, select_experts, sequence_balance_loss
from r1jax.models.quantized import rounding_by
from r1jax.ops.quantized_dot import Scheme, weight_codes
from r1jax.train.step import balance_routers

CONFIG = DecoderConfig(
    hidden_size=6, moe_intermediate_size=4, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3
)


def choose(scores, bias, config):
    """Sets of experts and their weights by expert, token by token."""
    size = config.n_routed_experts // config.n_group
    result = []
    for row in np.asarray(scores, np.float64):
        biased = row + bias
        groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
        if config.scoring_func == "sigmoid":
            groups.sort(key=lambda group: -sum(sorted(biased[group], reverse=True)[:2]))
        else:
            groups.sort(key=lambda group: -max(biased[group]))
        allowed = sum(groups[: config.topk_group], [])
        best = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
        total = sum(row[best]) if config.norm_topk_prob else 1.0
        result.append({e: row[e] / total * config.routed_scaling_factor for e in best})
    return result


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_group": 1, "topk_group": 1},
        {"topk_group": 4},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
        {"norm_topk_prob": False, "routed_scaling_factor": 16.0, "scoring_func": "softmax"},
    ],
    ids=["published", "no groups", "all groups", "a whole group", "V2"],
)
@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["", "biased scores below 0"])
def test_choice_and_weights_equal_the_loop(change, shift):
    config = replace(CONFIG, **change)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 8))
    scores = 1 / (1 + np.exp(-logits)) if config.scoring_func == "sigmoid" else np.exp(logits)
    if config.scoring_func == "softmax":
        scores /= scores.sum(-1, keepdims=True)
    bias = (0.3 * rng.standard_normal(8) + shift).astype(np.float32)
    scores = scores.astype(np.float32)
    experts, weights = select_experts(jnp.asarray(scores), jnp.asarray(bias), config)
    for e, w, expected in zip(np.asarray(experts), np.asarray(weights), choose(scores, bias, config), strict=True):
        assert set(e.tolist()) == expected.keys()
        np.testing.assert_allclose(w, [expected[int(i)] for i in e], rtol=1e-5)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_shares_without_sorting_are_those_of_the_choice(scoring_func, bias):
    config = replace(CONFIG, scoring_func=scoring_func)
    scores = jnp.round(jax.random.uniform(jax.random.key(0), (64, 8)) * 8) / 8  # so coarse that there are ties
    bias = jnp.full(8, bias)
    experts, weights = select_experts(scores, bias, config)
    expected = np.zeros((64, 8), np.float32)
    np.put_along_axis(expected, np.asarray(experts), np.asarray(weights), axis=1)
    shares = jax.jit(expert_shares, static_argnums=2)(scores, bias, config)
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    assert (np.asarray(shares) > 0).sum() == (expected > 0).sum()


def test_the_dense_mixture_equals_the_sorted_one():
    module, rng = MoE(CONFIG, jnp.float32), np.random.default_rng(0)
    x, valid = jnp.asarray(rng.standard_normal((2, 5, 6)), jnp.float32), jnp.ones((2, 5), bool)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, valid)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)
    sorted_out, stats = jax.jit(module.apply)(params, x, valid)
    with dense_mixtures():
        lowered = jax.jit(lambda *arguments: module.apply(*arguments)).lower(params, x, valid)
        program = jax.jit(lambda *arguments: module.apply(*arguments)[0]).lower(params, x, valid).as_text()
    dense_out, dense_stats = lowered.compile()(params, x, valid)
    np.testing.assert_allclose(dense_out, sorted_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dense_stats.load, stats.load)
    assert "sort" not in program and "top_k" not in program


def test_the_dense_mixture_of_codes_in_fp32_equals_the_sorted_one_of_int8():
    """Their inputs are rounded alike, token by token and expert by expert."""
    module, rng, scheme = Experts(CONFIG, jnp.float32), np.random.default_rng(0), Scheme("int8", "int8")
    x = jnp.asarray(rng.standard_normal((2, 5, 6)), jnp.float32)
    scores, bias = jnp.asarray(rng.uniform(size=(2, 5, CONFIG.n_routed_experts)), jnp.float32), jnp.zeros(8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, scores, bias)["params"]
    codes = jax.tree.map(lambda leaf: weight_codes(jnp.asarray(rng.standard_normal(leaf.shape)), scheme), shapes)
    in_fp32 = {name: q._replace(values=q.values.astype(jnp.float32)) for name, q in codes.items()}
    with rounding_by(("int8",)):
        sorted_out = jax.jit(module.apply)({"params": codes}, x, scores, bias).output
        with dense_mixtures():
            product = jax.jit(lambda *arguments: module.apply(*arguments).output)
            dense = product.lower({"params": in_fp32}, x, scores, bias)
    assert "xi32>" not in "".join(line for line in dense.as_text().splitlines() if "dot_general" in line)
    np.testing.assert_allclose(dense.compile()({"params": in_fp32}, x, scores, bias), sorted_out, rtol=1e-4, atol=1e-5)


def test_bias_decides_who_wins_but_not_the_weight():
    scores = jnp.asarray([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])
    config = replace(CONFIG, n_group=1, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.0)
    experts, weights = select_experts(scores, jnp.asarray([0.0] * 7 + [5.0]), config)
    assert experts.tolist() == [[7, 0]]
    np.testing.assert_allclose(weights, [[0.2 / 1.1, 0.9 / 1.1]], rtol=1e-6)


def test_dropped_groups_lose_even_against_negative_scores():
    """Group 0 wins; with zeros for the others, experts 2 to 7 would beat its biased scores."""
    scores = jnp.asarray([[0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    config = replace(CONFIG, topk_group=1, num_experts_per_tok=2)
    experts, _ = select_experts(scores, jnp.full(8, -3.0), config)
    assert sorted(experts[0].tolist()) == [0, 1]


def test_group_is_scored_by_its_two_best():
    scores = jnp.asarray([[0.9, 0.1, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0]])
    one = replace(CONFIG, topk_group=1, num_experts_per_tok=2)
    assert sorted(select_experts(scores, jnp.zeros(8), one)[0][0].tolist()) == [2, 3]
    v2 = replace(one, scoring_func="softmax")
    assert sorted(select_experts(scores, jnp.zeros(8), v2)[0][0].tolist()) == [0, 1]


def balance_loops(scores, chosen, valid, k):
    """Equations 17 to 20, symbol by symbol, of each sequence; mean over the sequences."""
    batch, length, experts = scores.shape
    losses = []
    for b in range(batch):
        tokens = [t for t in range(length) if valid[b, t]]
        loss = 0.0
        for i in range(experts):
            f = experts / (k * max(len(tokens), 1)) * sum(chosen[b, t, i] for t in tokens)
            p = sum(scores[b, t, i] / sum(scores[b, t]) for t in tokens) / max(len(tokens), 1)
            loss += f * p
        losses.append(loss)
    return np.mean(losses)


@pytest.mark.parametrize("padding", ["none", "some", "one sequence"])
def test_balance_loss_equals_the_equations(padding):
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.05, 1, (3, 5, 6))
    chosen = np.zeros((3, 5, 6))
    for b, t in np.ndindex(3, 5):
        chosen[b, t, rng.permutation(6)[:2]] = 1
    valid = np.ones((3, 5), bool)
    if padding != "none":
        valid[0, 3:], valid[1, :2] = False, False
    if padding == "one sequence":
        valid[2] = False
    arguments = (jnp.asarray(chosen, jnp.float32), jnp.asarray(valid), 2)
    value, gradient = jax.value_and_grad(sequence_balance_loss)(jnp.asarray(scores, jnp.float32), *arguments)
    np.testing.assert_allclose(value, balance_loops(scores, chosen, valid, 2), rtol=1e-6)
    assert not np.asarray(gradient)[~valid].any()
    step = 1e-5 * rng.standard_normal(scores.shape)
    ends = [balance_loops(scores + h * step, chosen, valid, 2) for h in (1, -1)]
    np.testing.assert_allclose(np.sum(np.asarray(gradient, float) * step), (ends[0] - ends[1]) / 2, rtol=1e-4)


def test_even_routing_has_balance_loss_one():
    chosen = jnp.tile(jnp.eye(4), (1, 2, 1))
    assert sequence_balance_loss(jnp.full((1, 8, 4), 0.3), chosen, jnp.ones((1, 8), bool), 1) == pytest.approx(1.0)


def make(config, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((2, 5, config.hidden_size)), dtype)
    module, valid = MoE(config, dtype), jnp.ones((2, 5), bool)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, valid))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) / 2, jnp.float32), shapes)
    return jax.jit(lambda params, x, valid: module.apply({"params": params}, x, valid)), params, x


def mlp64(x, gate, up, down):
    y = gate @ x
    return down @ (y / (1 + np.exp(-y)) * (up @ x))


@pytest.mark.parametrize("shared", [0, 2])
def test_mixture_equals_the_loop(shared):
    config = replace(CONFIG, n_shared_experts=shared)
    apply, params, x = make(config)
    valid = np.array([[True] * 5, [False, False, True, True, True]])
    y, stats = apply(params, x, jnp.asarray(valid))
    p, flat = jax.tree.map(np.float64, params), np.asarray(x, np.float64).reshape(-1, 6)
    scores = 1 / (1 + np.exp(-flat @ p["gate"]["weight"].T))
    choices = choose(scores, p["gate"]["e_score_correction_bias"], config)
    expected, load = np.zeros_like(flat), np.zeros(8)
    for t, chosen in enumerate(choices):
        for e, weight in chosen.items():
            gate, up = np.split(p["experts"]["gate_up_proj"][e], 2)
            expected[t] += weight * mlp64(flat[t], gate, up, p["experts"]["down_proj"][e])
            load[e] += valid.ravel()[t]
        if shared:
            weights = [p["shared_experts"][f"{name}_proj"]["weight"] for name in ("gate", "up", "down")]
            assert weights[0].shape == (2 * 4, 6)
            expected[t] += mlp64(flat[t], *weights)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 6), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(stats.load, load)
    chosen = np.zeros((10, 8))
    for t, row in enumerate(choices):
        chosen[t, list(row)] = 1
    expected_balance = balance_loops(scores.reshape(2, 5, 8), chosen.reshape(2, 5, 8), valid, 3)
    np.testing.assert_allclose(stats.balance_loss, expected_balance, rtol=1e-5)


def test_gradient_reaches_the_router_but_not_its_bias():
    apply, params, x = make(CONFIG)
    valid = jnp.ones((2, 5), bool)

    def loss(params):
        y, stats = apply(params, x, valid)
        return jnp.sum(y**2) + stats.balance_loss

    gradient = jax.grad(loss)(params)
    assert not np.any(gradient["gate"]["e_score_correction_bias"])
    assert np.abs(gradient["gate"]["weight"]).max() > 1e-3
    assert np.abs(gradient["experts"]["gate_up_proj"]).max() > 1e-3


def test_router_is_fp32_in_a_bf16_model():
    """A difference of 2^-12 between two experts survives, though bf16 weights and inputs could not hold it."""
    config = replace(CONFIG, n_group=1, topk_group=1, num_experts_per_tok=1, n_routed_experts=2)
    apply, params, _ = make(config, dtype=jnp.bfloat16)
    weight = jnp.ones((2, 6)).at[1, 0].add(2.0**-12)
    params["gate"] = {"weight": weight, "e_score_correction_bias": jnp.zeros(2)}
    _, stats = apply(params, jnp.ones((2, 5, 6), jnp.bfloat16) * 0.1, jnp.ones((2, 5), bool))
    assert stats.load.tolist() == [0, 10]


def test_balancing_raises_the_bias_of_idle_experts():
    config = replace(CONFIG, num_hidden_layers=3, first_k_dense_replace=1)
    bias = {"mlp": {"gate": {"weight": jnp.ones((4, 2)), "e_score_correction_bias": jnp.zeros(4)}}}
    params = {
        "head": jnp.ones(2),
        "decoder": {"layers_0": {"mlp": jnp.ones(1)}, "layers_1": bias, "layers_2": bias, "mtp": {"layer": bias}},
    }
    loads = ([4.0, 0.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [9.0, 0.0, 0.0, 3.0])
    loads = tuple(jnp.asarray(load) for load in loads)

    def moved(tree):
        return tree["mlp"]["gate"]["e_score_correction_bias"]

    new = balance_routers(params, loads, config, 0.5)
    np.testing.assert_allclose(moved(new["decoder"]["layers_1"]), [-0.5, 0.5, 0.5, -0.5])
    np.testing.assert_array_equal(moved(new["decoder"]["layers_2"]), np.zeros(4))
    np.testing.assert_allclose(moved(new["decoder"]["mtp"]["layer"]), [-0.5, 0.5, 0.5, 0.0])
    # Everything else stays, the argument included; without MTP's statistics its bias stays too.
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert not np.any(moved(params["decoder"]["layers_1"]))
    np.testing.assert_array_equal(new["decoder"]["layers_1"]["mlp"]["gate"]["weight"], np.ones((4, 2)))
    without = balance_routers(params, loads[:2], config, 0.5)
    assert not np.any(moved(without["decoder"]["mtp"]["layer"]))


def test_balancing_evens_out_the_load():
    config = replace(CONFIG, n_group=1, topk_group=1, num_experts_per_tok=1)
    logits = np.random.default_rng(0).standard_normal((512, 8)) + np.linspace(-1, 1, 8)
    scores = jax.nn.sigmoid(jnp.asarray(logits, jnp.float32))
    tree = {"mlp": {"gate": {"e_score_correction_bias": jnp.zeros(8)}}}
    params = {"decoder": {"layers_1": tree}}
    config, violations = replace(config, num_hidden_layers=2, num_nextn_predict_layers=0), []
    choose = jax.jit(lambda bias: jnp.bincount(select_experts(scores, bias, config)[0].ravel(), length=8))
    for _ in range(100):
        load = choose(params["decoder"]["layers_1"]["mlp"]["gate"]["e_score_correction_bias"]).astype(jnp.float32)
        violations.append(float(load.max() / load.mean() - 1))
        params = balance_routers(params, (load,), config, 0.01)
    assert violations[0] > 1 and violations[-1] < 0.3
