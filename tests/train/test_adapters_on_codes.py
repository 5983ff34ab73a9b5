"""Adapters on frozen codes: what is trained, what is kept, what goes on, and what is served of it."""

import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.arguments import GenerationSettings
from r1jax.errors import UserError
from r1jax.models.lora import split_adapters
from r1jax.models.r1 import Inputs
from r1jax.ops.quantize import dequantize
from r1jax.serve.evaluate import restore_served
from r1jax.serve.generate import Generator
from r1jax.serve.pretrained import from_checkpoint
from r1jax.train.checkpoints import CheckpointFolder, write_sealed
from r1jax.train.lazy import lazy_decoder
from r1jax.train.quantized import FOLDER, is_codes, path_of, write_codes
from r1jax.train.run import describe, open_run, restore_or_init
from r1jax.train.start import start_from
from tests.train.experiment import Interrupted, make_experiment, optax_promotes

FLAGS = ("--quant", "experts=int4", "int8", "--model.lora_rank", "2", "--model.dropout", "0.0")


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(*FLAGS, file="tiny_language.py")


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    """A finished run: its folder and its last state."""
    folder = tmp_path_factory.mktemp("run")
    return folder, experiment.train(folder)[0]


def frozen(tree):
    return split_adapters(tree)[1]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def test_weights_are_codes_without_moments_and_adapters_alone_move(experiment, trained):
    fresh, (_, last) = experiment.fresh, trained
    held = [x for x in jax.tree.leaves(fresh.params, is_leaf=is_codes) if is_codes(x)]
    narrow, floats = sum(x.values.nbytes for x in held), sum(x.nbytes for x in jax.tree.leaves(frozen(fresh.params)))
    assert narrow > 0.85 * floats - sum(x.scale.nbytes for x in held), "something large was left in floats"
    adapters = sum(x.size for x in jax.tree.leaves(split_adapters(fresh.params)[0]))
    moments = sum(x.size for x in jax.tree.leaves(fresh.optimizer) if x.ndim)
    assert moments == 2 * adapters
    assert_same(frozen(last.params), frozen(fresh.params))
    assert_same(frozen(last.ema), frozen(fresh.params))
    assert not any(
        np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(split_adapters(x.params)[0]) for x in (last, fresh)), strict=True)
    )


def test_a_run_goes_on_bit_for_bit(experiment, trained, tmp_path):
    stop = Interrupted(experiment.step, 4, signal.SIGTERM)
    assert experiment.train(tmp_path, step=stop)[2]
    assert_same(experiment.train(tmp_path)[0], trained[1])


@pytest.fixture(scope="module")
def states(experiment, trained):
    """The text states of the training forward, and the checkpoint that they are of."""
    checkpoint = CheckpointFolder(trained[0] / "checkpoints").all()[-1]
    config = replace(experiment.config, workdir=str(trained[0]))
    params = restore_served(
        checkpoint, config, experiment.model, experiment.task, experiment.mesh, experiment.validation
    )
    return checkpoint, params


def test_it_is_scored_and_answers_with_its_adapters(experiment, trained, states):
    checkpoint, params = states
    assert_same(params, trained[1].ema)
    source = from_checkpoint(checkpoint.path)
    decoder = source.load("cpu")
    assert_same(jax.device_get(decoder), jax.device_get(params["decoder"]))
    generator = Generator(source.decoder, decoder, dtype=source.computes_in, quant=source.quant, lora=source.lora)
    answer = generator.generate([[1, 40, 7]], GenerationSettings(max_new_tokens=4, page_size=4))
    text = jnp.asarray([[1, 40, 7, *answer.tokens[0, :3]]], jnp.int32)
    inputs = Inputs(text=text, text_valid=jnp.ones(text.shape, bool))
    forward = jax.jit(lambda params: experiment.model.apply({"params": params}, inputs, language=True).text_logits)
    known = jax.nn.log_softmax(forward(params), axis=-1)[0, 2:]
    told = np.take_along_axis(np.asarray(known), answer.tokens[0][:, None], axis=1)[:, 0]
    np.testing.assert_allclose(answer.logprobs[0], told, rtol=0, atol=0.02)  # kv_b_proj meets other activations


def test_adapters_and_codes_are_not_merged(states):
    with pytest.raises(UserError, match=r"adapters on codes \(model\.quant experts=int4 int8\)"):
        lazy_decoder(states[0])


def test_a_run_starts_from_codes_as_they_were_made(experiment, trained, tmp_path):
    init = str(trained[0])
    state, said = start_from(init, experiment.init(), experiment.config.model, tmp_path)
    assert_same(state.params, trained[1].ema)
    count = len(jax.tree.leaves(state.params))
    assert said[0].endswith(f"{count} of {count} arrays taken")
    other = replace(experiment.config.model, quant=("int8",))
    with pytest.raises(UserError, match=r"by --quant experts=int4 int8 \(as they were made\), a --model\.lora_rank"):
        start_from(init, experiment.init(), other, tmp_path)


def test_a_run_starts_from_what_the_command_made(experiment, trained, tmp_path):
    """The format of `r1jax quantize` has the codes without adapters; those stay fresh."""
    made = replace(experiment.config, model=replace(experiment.config.model, lora_rank=0))
    base = frozen(trained[1].params)
    kinds = {name: "int4" if "experts" in name else "int8" for name in names_of_codes(base)}
    write_sealed(
        tmp_path / "made", base, made, {"step": 6}, None, lambda draft: write_codes(draft / FOLDER, base, kinds)
    )
    fresh = experiment.init()
    state, _ = start_from(str(tmp_path / "made"), fresh, experiment.config.model, tmp_path)
    assert_same(frozen(state.params), base)
    assert_same(split_adapters(state.params)[0], split_adapters(fresh.params)[0])
    half = fresh._replace(
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, fresh.params)
    )
    taken, _ = start_from(str(tmp_path / "made"), half, experiment.config.model, tmp_path)
    assert [x.dtype for x in jax.tree.leaves(taken.params)] == [x.dtype for x in jax.tree.leaves(half.params)]
    floats = make_state_of_floats(experiment)
    with pytest.raises(UserError, match="holds codes, which do not change"):
        start_from(str(tmp_path / "made"), floats, made.model, tmp_path)


@pytest.mark.parametrize(("part", "told"), [("balance", "balanced inputs"), ("span", "static inputs")])
def test_codes_whose_inputs_are_balanced_or_static_are_refused(experiment, trained, tmp_path, part, told):
    """A run keeps codes and scales alone, which then stand for other weights."""
    made = replace(experiment.config, model=replace(experiment.config.model, lora_rank=0))

    def balanced(path, x):
        if not path_of(path).endswith("layers_0/self_attn/o_proj/weight"):
            return x
        more = {"balance": jnp.full((1, x.shape[-1]), 2, jnp.bfloat16), "span": jnp.ones((1, 1))}
        return x._replace(**{part: more[part]})

    base = jax.tree_util.tree_map_with_path(balanced, frozen(trained[1].params), is_leaf=is_codes)
    kinds = {name: "int4" if "experts" in name else "int8" for name in names_of_codes(base)}
    folder = tmp_path / "made"
    write_sealed(folder, base, made, {"step": 6}, None, lambda draft: write_codes(draft / FOLDER, base, kinds))
    with pytest.raises(UserError, match=rf"{told} \(decoder\.layers_0\.self_attn\.o_proj\.weight\).*--balance False"):
        start_from(str(folder), experiment.init(), experiment.config.model, tmp_path)


def names_of_codes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_codes)
    return [path_of(path) for path, leaf in leaves if is_codes(leaf)]


def make_state_of_floats(experiment):
    """The same state with floats in the place of codes."""
    wide = lambda x: dequantize(x) if is_codes(x) else x  # noqa: E731
    fresh = experiment.init()
    return fresh._replace(params=jax.tree.map(wide, frozen(fresh.params), is_leaf=is_codes))


def test_floats_that_a_run_starts_from_are_rounded(experiment, trained, tmp_path):
    floats = make_state_of_floats(experiment)
    plain = replace(experiment.config, model=replace(experiment.config.model, quant=(), lora_rank=0))
    meta = {"validation": None, **describe(experiment.source, experiment.task.pipeline)}
    CheckpointFolder(tmp_path / "floats" / "checkpoints").save(1, {"params": floats.params}, plain, meta)
    config = replace(
        experiment.config,
        workdir=str(tmp_path / "run"),
        train=replace(experiment.config.train, init=str(tmp_path / "floats")),
    )
    with open_run(config) as run, optax_promotes():
        state, _ = restore_or_init(
            config, run, experiment.model, experiment.task, experiment.mesh, experiment.source, experiment.batch
        )
    # What codes stand for is rounded to the same codes.
    assert_same(frozen(state.params), frozen(experiment.fresh.params))
    assert_same(frozen(state.ema), frozen(experiment.fresh.params))
