"""The decoder against Hugging Face's DeepSeek-V3 (stored by make_fixture.py) and against a float64 forward in NumPy."""

import json
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, YarnConfig
from r1jax.models.decoder import Decoder
from r1jax.models.moe import Router, select_experts
from r1jax.ops.losses import cross_entropy
from tests.processes import FAST

AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""Other tests compile without LLVM's optimisations, whose order of additions is not that of a user's program."""
if "fusion_emitters" in FAST:
    AS_USERS_COMPILE["xla_cpu_use_fusion_emitters"] = True
FIXTURE = Path(__file__).with_name("deepseek_v3_tiny.npz")
TINY = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
    rms_norm_eps=1e-3,
    rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=32),
)


def config_of(published):
    """DecoderConfig of a Hugging Face config.json."""
    rope = published["rope_parameters"]
    kinds = {f.name: type(f.default) for f in fields(YarnConfig)}  # JSON writes 32.0 as 32
    yarn = YarnConfig(**{n: kind(rope[n]) for n, kind in kinds.items()}) if rope.get("factor") else YarnConfig()
    names = {f.name for f in fields(DecoderConfig)} & published.keys()
    return DecoderConfig(**{name: published[name] for name in names}, rope_scaling=yarn, rope_theta=rope["rope_theta"])


def nest(tensors):
    """Nested dict of dotted names."""
    tree = {}
    for name, value in tensors.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def stack_experts(mlp, count):
    """Expert weights as the decoder keeps them."""
    experts = [mlp["experts"][str(i)] for i in range(count)]
    both = [np.concatenate([e["gate_proj"]["weight"], e["up_proj"]["weight"]]) for e in experts]
    return mlp | {
        "experts": {
            "gate_up_proj": np.stack(both),
            "down_proj": np.stack([e["down_proj"]["weight"] for e in experts]),
        }
    }


def params_of(tensors, config):
    """Parameters of the decoder from a checkpoint's tensors by their names on disk."""
    tree = nest(tensors)
    layers = [layer for _, layer in sorted(tree["model"]["layers"].items(), key=lambda item: int(item[0]))]
    for layer in layers:
        if "experts" in layer["mlp"]:
            layer["mlp"] = stack_experts(layer["mlp"], config.n_routed_experts)
    params = {"embed_tokens": tree["model"]["embed_tokens"]["weight"], "norm": tree["model"]["norm"]}
    params |= {"lm_head": tree["lm_head"]}
    params |= {f"layers_{i}": layers[i] for i in range(config.num_hidden_layers)}
    if config.num_nextn_predict_layers:
        last = layers[config.num_hidden_layers]
        block = {k: last[k] for k in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")}
        params["mtp"] = {k: last[k] for k in ("enorm", "hnorm", "eh_proj")}
        params["mtp"] |= {"layer": block, "shared_head_norm": last["shared_head"]["norm"]}
    return jax.tree.map(np.float32, params)


def run_all(decoder, tokens):
    """Next-token logits and, where the decoder has MTP, those of the token after next; router statistics."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    valid = jnp.ones(tokens.shape, bool)
    hidden, stats = decoder(decoder.embed(tokens), positions, valid)
    if not decoder.config.num_nextn_predict_layers:
        return decoder.logits(hidden), None, stats
    states, last = decoder.predict_second(hidden[:, :-1], tokens[:, 1:], positions[:, :-1], valid[:, :-1])
    return decoder.logits(hidden), decoder.logits(states), (*stats, last)


def routers(captured):
    """Scores and bias of every router, in the order of the layers, MTP last."""
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(captured, is_leaf=lambda x: isinstance(x, tuple)):
        found[".".join(p.key for p in path)] = value[0]
    return [found[name] for name in sorted(found)]  # "layers_1...." < "mtp...."


def chosen_experts(captured, config):
    """Sorted experts and their weights in every router."""
    for scores, bias in routers(captured):
        experts, weights = select_experts(scores, bias, config)
        order = np.argsort(experts, axis=-1)
        yield np.take_along_axis(np.asarray(experts), order, -1), np.take_along_axis(np.asarray(weights), order, -1)


@pytest.fixture(scope="module")
def tiny():
    """Config, parameters, tokens and reference arrays of the stored checkpoint."""
    stored = np.load(FIXTURE)
    config = config_of(json.loads(str(stored["config"])))
    weights = {n.removeprefix("weight/"): stored[n] for n in stored.files if n.startswith("weight/")}
    return config, params_of(weights, config), jnp.asarray(stored["input_ids"]), stored


@pytest.fixture(scope="module")
def tiny_outputs(tiny):
    config, params, tokens, _ = tiny

    @jax.jit
    def run(params):
        return Decoder(config).apply(
            {"params": params},
            tokens,
            method=run_all,
            capture_intermediates=lambda module, _: isinstance(module, Router),
            mutable=["intermediates"],
        )

    return run(params)


def test_fixture_would_show_the_known_traps(tiny):
    config, params, _, stored = tiny
    assert config.rms_norm_eps > 1e-3  # the latent norms keep 1e-6
    assert config.rope_scaling.factor > 1 and config.q_lora_rank and config.topk_group < config.n_group
    biases = [params[k]["mlp"]["gate"]["e_score_correction_bias"] for k in ("layers_1", "layers_2")]
    assert np.max(biases) < -0.5  # so that a dropped group masked with 0 instead of -inf would win
    assert stored["logits"].std() > 0.5


def test_logits_equal_hugging_face(tiny, tiny_outputs):
    stored = tiny[3]
    (logits, mtp_logits, _), _ = tiny_outputs
    np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(mtp_logits, stored["mtp_logits"], rtol=0, atol=5e-6)


def test_chosen_experts_equal_hugging_face(tiny, tiny_outputs):
    config, _, _, stored = tiny
    (_, _, stats), captured = tiny_outputs
    choices = list(chosen_experts(captured["intermediates"], config))
    assert len(choices) == len(stats) == 3
    for i, ((experts, weights), layer) in enumerate(zip(choices, stats, strict=True)):
        np.testing.assert_array_equal(experts, stored[f"experts_{i}"])
        np.testing.assert_allclose(weights, stored[f"weights_{i}"], rtol=2e-5, atol=0)
        np.testing.assert_array_equal(layer.load, np.bincount(stored[f"experts_{i}"].ravel(), minlength=8))


def test_gradients_equal_hugging_face(tiny):
    config, params, tokens, stored = tiny

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        logits, second, _ = Decoder(config).apply({"params": params}, tokens, method=run_all)
        main = cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()
        return main + 0.3 * cross_entropy(second[:, :-1], tokens[:, 2:]).mean()

    loss, gradient = loss_and_gradient(params)
    np.testing.assert_allclose(loss, stored["loss"], rtol=1e-6)
    gradients = names_on_disk(gradient)
    for name, value in gradients.items():
        if name.endswith("e_score_correction_bias"):
            assert not np.any(value), name
        else:
            np.testing.assert_allclose(np.linalg.norm(value), stored[f"gradient_norm/{name}"], rtol=1e-4, err_msg=name)
    names = [n.removeprefix("gradient/") for n in stored.files if n.startswith("gradient/")]
    assert len(names) >= 10
    for name in names:
        reference = stored[f"gradient/{name}"]
        np.testing.assert_allclose(
            gradients[name], reference, rtol=0, atol=1e-4 * np.abs(reference).max(), err_msg=name
        )


def names_on_disk(params):
    """Arrays of a parameter tree by Hugging Face's names, experts stacked as in its memory."""
    flat = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(p.key for p in path)
        name = name.replace("mtp.shared_head_norm", "mtp.shared_head.norm").replace("mtp.layer.", "layers_3.")
        name = name.replace("mtp.", "layers_3.").replace("layers_", "layers.")
        name = name if name.startswith("lm_head") else f"model.{name}"
        flat[name + ".weight" if name == "model.embed_tokens" else name] = value
    return flat


def read_safetensors(path):
    """Tensors of a file: eight bytes of header length, a JSON header, then the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32}
    return {
        name: np.frombuffer(data[start + t["data_offsets"][0] : start + t["data_offsets"][1]], kinds[t["dtype"]])
        .reshape(t["shape"])
        .copy()
        for name, t in header.items()
    }


@pytest.mark.parametrize("name", ["v3", "v3_noqlora"])
def test_larger_checkpoints_of_hugging_face(shared_data, name):
    folder = shared_data.parent / "hf_reference" / name
    if not folder.is_dir():
        pytest.skip(f"no reference checkpoint {folder}")
    config = config_of(json.loads((folder / "config.json").read_text("utf-8")))
    reference = np.load(folder / "reference.npz")
    params = params_of(read_safetensors(folder / "model.safetensors"), config)
    tokens = jnp.asarray(reference["input_ids"])
    run = jax.jit(
        lambda params: Decoder(config).apply(
            {"params": params},
            tokens,
            method=run_all,
            capture_intermediates=lambda module, _: isinstance(module, Router),
            mutable=["intermediates"],
        ),
        compiler_options=AS_USERS_COMPILE,
    )
    (logits, mtp_logits, _), captured = run(params)
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=5e-6)
    if config.num_nextn_predict_layers:
        np.testing.assert_allclose(mtp_logits, reference["mtp_logits"], rtol=0, atol=5e-6)
    mixed = config.num_hidden_layers - config.first_k_dense_replace  # the MTP module's choices are not stored
    for i, (experts, _) in enumerate(list(chosen_experts(captured["intermediates"], config))[:mixed]):
        np.testing.assert_array_equal(experts, reference[f"topk_idx_{i}"])


# A second implementation, one token at a time and in float64, that shares nothing with r1jax but the weights' names.


def norm64(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def mlp64(x, p):
    gate = x @ p["gate_proj"]["weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ p["up_proj"]["weight"].T)) @ p["down_proj"]["weight"].T


def frequencies64(c):
    """YaRN's frequencies, pair by pair."""
    result = []
    yarn, d = c.rope_scaling, c.qk_rope_head_dim
    for i in range(d // 2):
        frequency = c.rope_theta ** (-2 * i / d)
        if yarn.factor > 1:
            turns = [yarn.beta_fast, yarn.beta_slow]
            ends = [
                d * np.log(yarn.original_max_position_embeddings / (2 * np.pi * r)) / (2 * np.log(c.rope_theta))
                for r in turns
            ]
            low, high = max(np.floor(ends[0]), 0), min(np.ceil(ends[1]), d - 1)
            slow = np.clip((i - low) / max(high - low, 0.001), 0, 1)
            frequency = slow * frequency / yarn.factor + (1 - slow) * frequency
        result.append(frequency)
    return np.array(result)


def turn64(x, position, c):
    """Rotary embedding of one head's channels as multiplication of complex numbers."""
    half = x.shape[-1] // 2
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if c.rope_interleave else x[..., :half] + 1j * x[..., half:]
    pairs = pairs * np.exp(1j * position * frequencies64(c))
    return np.concatenate([pairs.real, pairs.imag], -1)


def attention64(x, p, c):
    heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    if c.q_lora_rank:
        q = norm64(x @ p["q_a_proj"]["weight"].T, p["q_a_layernorm"]["weight"], 1e-6) @ p["q_b_proj"]["weight"].T
    else:
        q = x @ p["q_proj"]["weight"].T
    q = q.reshape(len(x), heads, nope + rope)
    compressed = x @ p["kv_a_proj_with_mqa"]["weight"].T
    latent = norm64(compressed[:, : c.kv_lora_rank], p["kv_a_layernorm"]["weight"], 1e-6)
    kv = (latent @ p["kv_b_proj"]["weight"].T).reshape(len(x), heads, nope + c.v_head_dim)
    magnitude = 0.1 * c.rope_scaling.mscale_all_dim * np.log(c.rope_scaling.factor) + 1
    out = np.zeros((len(x), heads, c.v_head_dim))
    for t in range(len(x)):
        for h in range(heads):
            query = np.concatenate([q[t, h, :nope], turn64(q[t, h, nope:], t, c)])
            keys = [
                np.concatenate([kv[s, h, :nope], turn64(compressed[s, c.kv_lora_rank :], s, c)]) for s in range(t + 1)
            ]
            scores = np.stack(keys) @ query * magnitude**2 / np.sqrt(nope + rope)
            weight = np.exp(scores - scores.max())
            out[t, h] = weight / weight.sum() @ kv[: t + 1, h, nope:]
    return out.reshape(len(x), -1) @ p["o_proj"]["weight"].T


def experts64(x, p, c):
    """Mixture of one token after another; the choice is made with sorted Python lists."""
    out, per_group = np.zeros_like(x), c.n_routed_experts // c.n_group
    for t, token in enumerate(x):
        scores = 1 / (1 + np.exp(-p["gate"]["weight"] @ token))
        biased = scores + p["gate"]["e_score_correction_bias"]
        groups = [range(g * per_group, (g + 1) * per_group) for g in range(c.n_group)]
        best = sorted(groups, key=lambda group: -sum(sorted(biased[list(group)])[-2:]))[: c.topk_group]
        chosen = sorted((e for group in best for e in group), key=lambda e: -biased[e])[: c.num_experts_per_tok]
        for e in chosen:
            both = np.split(p["experts"]["gate_up_proj"][e], 2)
            expert = {"gate_proj": both[0], "up_proj": both[1], "down_proj": p["experts"]["down_proj"][e]}
            weight = scores[e] / scores[chosen].sum() * c.routed_scaling_factor
            out[t] += weight * mlp64(token, {name: {"weight": w} for name, w in expert.items()})
    return out + mlp64(x, p["shared_experts"])


def layer64(x, p, c, dense):
    x = x + attention64(norm64(x, p["input_layernorm"]["weight"], c.rms_norm_eps), p["self_attn"], c)
    normed = norm64(x, p["post_attention_layernorm"]["weight"], c.rms_norm_eps)
    return x + (mlp64(normed, p["mlp"]) if dense else experts64(normed, p["mlp"], c))


def decoder64(tokens, p, c):
    """Logits of one sequence: next token, and token after next."""
    x = p["embed_tokens"][tokens]
    for i in range(c.num_hidden_layers):
        x = layer64(x, p[f"layers_{i}"], c, i < c.first_k_dense_replace)
    x, m = norm64(x, p["norm"]["weight"], c.rms_norm_eps), p["mtp"]
    embedded = norm64(p["embed_tokens"][tokens[1:]], m["enorm"]["weight"], c.rms_norm_eps)
    both = np.concatenate([embedded, norm64(x[:-1], m["hnorm"]["weight"], c.rms_norm_eps)], axis=-1)
    second = layer64(both @ m["eh_proj"]["weight"].T, m["layer"], c, False)
    second = norm64(second, m["shared_head_norm"]["weight"], c.rms_norm_eps)
    return x @ p["lm_head"]["weight"].T, second @ p["lm_head"]["weight"].T


def random_params(config, seed=0):
    """Parameters whose logits have a standard deviation near 1, with norms away from 1 and biases that matter."""
    rng = np.random.default_rng(seed)
    tokens = jnp.zeros((1, 3), jnp.int32)
    abstract = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), tokens, method=run_all))["params"]

    def draw(path, leaf):
        noise, name = rng.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if name == "e_score_correction_bias":
            return 0.3 * noise - 1.5
        if leaf.ndim == 1:
            return 1 + 0.3 * noise
        return noise if name == "embed_tokens" else noise / np.float32(np.sqrt(leaf.shape[-1]))

    return jax.tree_util.tree_map_with_path(draw, abstract)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": None},
        {"rope_interleave": False},
        {"rope_scaling": YarnConfig()},
        {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "first_k_dense_replace": 0},
    ],
    ids=["yarn", "no query compression", "rope in halves", "no yarn", "one group, all layers mixed"],
)
def test_logits_equal_float64(change):
    config = replace(TINY, **change)
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9))
    run = jax.jit(lambda params, tokens: Decoder(config).apply({"params": params}, tokens, method=run_all))
    logits, second, _ = run(params, jnp.asarray(tokens, jnp.int32))
    wide = jax.tree.map(np.float64, params)
    for row in range(2):
        reference, reference_second = decoder64(tokens[row], wide, config)
        assert reference.std() > 0.5
        np.testing.assert_allclose(logits[row], reference, rtol=0, atol=5e-6)
        np.testing.assert_allclose(second[row], reference_second, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def small():
    """A compiled decoder: hidden states and loads."""
    params = jax.tree.map(jnp.asarray, random_params(TINY))

    @jax.jit
    def run(embedded, valid):
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        hidden, stats = Decoder(TINY).apply({"params": params}, embedded, positions, valid)
        return hidden, stats[0].load

    return run


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5, -1, -1, -1], [-1, -1, -1, 0, 1, 2, 3, 4, 5], [0, -1, 1, 2, -1, 3, 4, -1, 5]]
)
def test_tokens_that_do_not_exist_change_nothing(small, order):
    rng = np.random.default_rng(0)
    real = rng.standard_normal((2, 6, TINY.hidden_size)).astype(np.float32)
    expected, load = small(jnp.asarray(real), jnp.ones((2, 6), bool))
    keep = np.array(order) >= 0
    padded = 100 * rng.standard_normal((2, 9, TINY.hidden_size)).astype(np.float32)
    padded[:, keep] = real
    hidden, padded_load = small(jnp.asarray(padded), jnp.broadcast_to(jnp.asarray(keep)[None], (2, 9)))
    np.testing.assert_allclose(np.asarray(hidden)[:, keep], expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(padded_load, load)
    assert np.isfinite(hidden).all()


def test_later_tokens_are_not_seen(small):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, TINY.hidden_size)).astype(np.float32)
    other = x.copy()
    other[:, 4:] += 1
    valid = jnp.ones((1, 6), bool)
    first, second = small(jnp.asarray(x), valid)[0], small(jnp.asarray(other), valid)[0]
    np.testing.assert_allclose(first[:, :4], second[:, :4], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(first - second))[:, 4:].max() > 0.1
