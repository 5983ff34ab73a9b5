"""`r1jax quantize` from a checkpoint to one that eval.py reads, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.__main__ import dispatch
from r1jax.arguments import GenerationSettings
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.ops.quantize import Quantized, dequantize
from r1jax.serve import quantize_command
from r1jax.serve.evaluate import restore_served
from r1jax.serve.generate import Generated, Generator
from r1jax.serve.pretrained import from_checkpoint
from r1jax.serve.quantize_weights import calibration_batch
from r1jax.tasks.catalog import TASKS
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.plan import example_batch
from r1jax.train.quantized import is_codes, path_of
from r1jax.train.ranges import is_range, split_ranges
from r1jax.train.run import describe
from r1jax.train.step import init_state
from tests.serve.exported import merged, write_checkpoint
from tests.train.experiment import one_device
from tests.train.tiny_language import get_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with one checkpoint, of fresh weights; that is enough to be quantized."""
    folder = tmp_path_factory.mktemp("run")
    config = get_config()
    task = TASKS[config.task.name](config)
    source = task.source("train")
    model = R1(config.model, task.heads)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda: init_state(config, model, task, example_batch(source, task, 4)))()
    meta = {"step": 1, "validation": None, **describe(source, task.pipeline)}
    CheckpointFolder(folder / "checkpoints").save(1, state, config, meta)
    return folder


@pytest.fixture(scope="module")
def quantized(trained, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("out") / "int4"
    words = ["--to", "int4", "--output", str(output), "--calibration", "4", "--batch_size", "8", "--resamples", "20"]
    with mock.patch.object(quantize_command, "make_mesh", lambda _: one_device()):
        assert dispatch(["quantize", str(trained), *words]) == 0
    return output


def test_the_codes_are_sealed_and_served(trained, quantized):
    checkpoint = Checkpoint(quantized)
    checkpoint.verify()
    config, before = checkpoint.config(), get_config()
    assert config == replace(before, model=replace(before.model, quant=("int4",)))
    assert checkpoint.quantized and config.model.quant == ("int4",) and checkpoint.step == 1
    task = TASKS[config.task.name](config)
    served = restore_served(checkpoint, config, R1(config.model, task.heads), task, one_device(), task.source("val"))
    assert isinstance(served["decoder"]["embed_tokens"], Quantized)
    exact = CheckpointFolder(trained / "checkpoints").best().restore_decoder()
    router = exact["layers_0"]["mlp"]["gate"]["weight"]
    np.testing.assert_array_equal(served["decoder"]["layers_0"]["mlp"]["gate"]["weight"], router)


def test_the_report_lies_beside_them(quantized):
    content = json.loads((quantized / "report" / "report.json").read_text())
    assert content["score"]["cases"] == len(TASKS["language"](get_config()).source("val"))
    assert {layer["scheme"] for layer in content["layers"]} == {"int8", "int4/128"}
    assert all(0 < layer["error"] < 0.2 for layer in content["layers"])
    assert "int4 weights alone" in content["model"]


@pytest.fixture(scope="module")
def mixed(trained, tmp_path_factory) -> Path:
    """Bits under two fifths of the size; embeddings of 16 numbers take much for their scales."""
    output = tmp_path_factory.mktemp("out") / "mixed"
    words = ["--budget", "0.4", "--output", str(output), "--calibration", "4", "--batch_size", "8", "--resamples", "2"]
    with mock.patch.object(quantize_command, "make_mesh", lambda _: one_device()):
        assert dispatch(["quantize", str(trained), *words]) == 0
    return output


def test_a_budget_chooses_the_bits_of_each_weight_and_the_report_says_why(mixed):
    content = json.loads((mixed / "report" / "report.json").read_text())
    weights, whole = content["budget"]["weights"], content["sizes"]["fp32_bytes"]
    assert {layer["name"]: layer["scheme"] for layer in content["layers"]} == {
        name: weight["chosen"] for name, weight in weights.items() if weight["chosen"] != "float"
    }
    spent = sum(o["bytes"] for w in weights.values() for o in w["options"] if o["rule"] == w["chosen"])
    stored = {layer["name"]: layer["bytes"] for layer in content["layers"]}
    assert all(
        o["bytes"] == stored.get(n, o["bytes"])
        for n, w in weights.items()
        for o in w["options"]
        if o["rule"] == w["chosen"]
    )
    norms = whole - sum(weight["options"][0]["bytes"] for weight in weights.values())
    assert 0.36 * whole < spent + norms <= 0.4 * whole
    assert Checkpoint(mixed).config().model.quant[0].startswith("^(") and content["model"].startswith("mixed")


def test_what_a_weight_changes_is_the_change_of_the_outputs_over_their_variance(trained, mixed):
    config, checkpoint = get_config(), CheckpointFolder(trained / "checkpoints").best()
    task = TASKS[config.task.name](config)
    model, source = R1(config.model, task.heads), task.source("train")
    params = restore_served(checkpoint, config, model, task, one_device(), source)
    inputs, _ = task.prepare(jax.tree.map(jnp.asarray, calibration_batch(task.collate, source, 4)))
    name = "decoder/layers_0/self_attn/o_proj/weight"
    weight = np.asarray(params["decoder"]["layers_0"]["self_attn"]["o_proj"]["weight"], np.float64)
    scale = np.asarray(jnp.asarray(np.abs(weight).max(axis=1, keepdims=True) / 127, jnp.bfloat16), np.float64)
    rounded = np.clip(np.round(weight / scale), -127, 127) * scale

    @jax.jit
    def chances(weight):
        layers = params["decoder"]["layers_0"]
        layer = layers | {"self_attn": layers["self_attn"] | {"o_proj": {"weight": weight}}}
        output = model.apply(
            {"params": {**params, "decoder": params["decoder"] | {"layers_0": layer}}}, inputs, language=True
        )
        return [jax.nn.log_softmax(logits) for logits in (output.text_logits, output.mtp_logits)]

    before, after = (jax.device_get(chances(jnp.asarray(w, jnp.float32))) for w in (weight, rounded))
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(before, after, strict=True)]
    change = sum(np.mean((b - a) ** 2) / np.var(a) for a, b in pairs)
    told = json.loads((mixed / "report" / "report.json").read_text())["budget"]["weights"][name]["options"]
    assert [option["rule"] for option in told] == ["float", "int8", "int4/128"] and told[0]["change"] == 0
    # 128 positions at most are in the batch, so that all of them are compared.
    assert told[1]["change"] == pytest.approx(change, rel=0.02)


@pytest.mark.parametrize(("words", "told"), [([], (False, True)), (["--balance", "False"], (False, False))])
def test_inputs_are_balanced_unless_it_is_left_out(trained, tmp_path, monkeypatch, words, told):
    def stop(*_, static, balance):
        raise InterruptedError(static, balance)

    monkeypatch.setattr(quantize_command, "choose_codes", stop)
    monkeypatch.setattr(quantize_command, "inputs_seen", lambda *_: {})
    monkeypatch.setattr(quantize_command, "make_mesh", lambda _: one_device())
    with pytest.raises(InterruptedError) as caught:
        dispatch(["quantize", str(trained), "--to", "int8", *words, "--output", str(tmp_path / "new")])
    assert caught.value.args == told


def test_rules_that_round_nothing_are_refused(trained, tmp_path, monkeypatch):
    config = get_config()
    floats = replace(config, model=replace(config.model, quant=(".=float",)))
    monkeypatch.setattr(Checkpoint, "config", lambda _: floats)
    monkeypatch.setattr(quantize_command, "make_mesh", lambda _: one_device())
    with pytest.raises(UserError, match=r"every weight stays a float: say by --to"):
        dispatch(["quantize", str(trained), "--output", str(tmp_path / "new")])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "trained with floats: say by --to"),
        (["--to", "int4", "--budget", "0.2"], "give one of the two"),
        (["--to", "int4", "--activations", "static"], "add --to int8 or --to fp8"),
        (["--to", "int4"], "exists already"),
    ],
)
def test_what_cannot_be_done_is_said(trained, quantized, words, told):
    with pytest.raises(UserError, match=told):
        dispatch(["quantize", str(trained), *words, "--output", str(quantized)])


def test_a_run_with_ranges_is_stored_as_it_was_trained(tmp_path):
    """Bit for bit; where no input has been met the codes have no range, and a decoder alone needs none."""
    config = replace(get_config(), model=replace(get_config().model, quant=("int8_running",)))
    task = TASKS[config.task.name](config)
    source, model = task.source("train"), R1(config.model, task.heads)
    batch = example_batch(source, task, 4)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda: init_state(config, model, task, batch))()
    unmet = "decoder/layers_0/self_attn/o_proj"
    known = lambda path, x: x if path_of(path[:-1]) == unmet else jnp.float32(1.25)  # noqa: E731
    ema = jax.tree_util.tree_map_with_path(lambda path, x: known(path, x) if is_range(path) else x, state.ema)
    meta = {"step": 1, "validation": None, **describe(source, task.pipeline)}
    CheckpointFolder(tmp_path / "checkpoints").save(1, state._replace(ema=ema), config, meta)
    words = ["--output", str(tmp_path / "codes"), "--calibration", "4", "--batch_size", "8", "--resamples", "2"]
    with mock.patch.object(quantize_command, "make_mesh", lambda _: one_device()):
        assert dispatch(["quantize", str(tmp_path), *words]) == 0
    codes = restore_served(Checkpoint(tmp_path / "codes"), config, model, task, one_device(), source)
    spans = {path_of(p): x.span for p, x in jax.tree_util.tree_leaves_with_path(codes, is_leaf=is_codes) if is_codes(x)}
    attention = {name: span for name, span in spans.items() if "self_attn" in name}
    assert attention.pop(f"{unmet}/weight") is None and len(attention) == 2 * 4 - 1
    assert all(span == 1.25 for span in attention.values()) and spans["decoder/lm_head/weight"] is None
    assert split_ranges(codes)[0] == {}

    @jax.jit
    def forward(params):
        output = model.apply({"params": params}, task.prepare(batch)[0], language=True)
        return output.text_logits, output.mtp_logits

    jax.tree.map(np.testing.assert_array_equal, forward(ema), forward(codes))
    served = CheckpointFolder(tmp_path / "checkpoints").best().restore_decoder()
    assert split_ranges(served)[0] == {} and "weight" in served["layers_0"]["self_attn"]["o_proj"]


PROMPTS, GREEDY = [[1, 40, 7], [9]], GenerationSettings(max_new_tokens=8, page_size=8)


@pytest.fixture(scope="module")
def codes(quantized) -> tuple[Generator, Generated]:
    """The language model of codes, and what it answers."""
    source = from_checkpoint(quantized)
    generator = Generator(source.decoder, source.load("cpu"), dtype=source.computes_in, quant=source.quant)
    return generator, generator.generate(PROMPTS, GREEDY)


def test_answers_are_those_of_the_dequantized_weights(codes):
    generator, answer = codes
    floats = jax.tree.map(lambda x: dequantize(x) if is_codes(x) else x, generator.params, is_leaf=is_codes)
    expected = Generator(generator.model.config, floats).generate(PROMPTS, GREEDY)
    np.testing.assert_array_equal(answer.tokens, expected.tokens)
    np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_weights_stay_codes_in_memory(codes):
    generator, _ = codes
    leaves = jax.tree.leaves(generator.params, is_leaf=is_codes)
    held = [x for x in leaves if is_codes(x)]
    assert {str(x.values.dtype) for x in held} == {"int8", "int4"}
    numbers, taken = (sum(getattr(x.values, name) for x in held) for name in ("size", "nbytes"))
    assert taken <= numbers  # JAX counts a byte for four bits; what a device takes depends on its version
    assert numbers > 0.9 * sum(x.size for x in leaves if not is_codes(x))


def test_the_cache_may_be_of_codes_too(codes):
    generator, exact = codes
    for cache, bound in (("int8", 0.02), ("fp8", 0.1)):
        narrow = replace(GREEDY, cache=cache)
        answer = generator.generate(PROMPTS, narrow)
        assert 0 < np.abs(answer.logprobs[:, :2] - exact.logprobs[:, :2]).max() < bound
        assert generator.cache_bytes(narrow) == 8 + 4 + 4 * 4 and generator.cache_bytes(GREEDY) == 4 * (8 + 4)


def test_the_command_answers_from_codes(codes, quantized, capsys):
    words = ["--prompt", "ab", "--max_new_tokens", "4", "--page_size", "8", "--cache", "int8", "--platform", "cpu"]
    assert dispatch(["generate", str(quantized), *words]) == 0
    shown = capsys.readouterr()
    assert shown.out and "3 tokens read, " in shown.err and "the cache takes 28 bytes a token" in shown.err


def test_codes_are_not_quantized_again_nor_trained_on(quantized, tmp_path):
    with pytest.raises(UserError, match="quantized already"):
        dispatch(["quantize", str(quantized), "--to", "int8", "--output", str(tmp_path / "again")])
    with pytest.raises(UserError, match="is quantized: eval.py, .*give the checkpoint that it was made from"):
        Checkpoint(quantized).stored()


def test_a_flipped_bit_is_found(quantized, tmp_path):
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    file = copy / "quantized" / "weights.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.bin is not what was written"):
        Checkpoint(copy).verify()


def test_a_model_that_reads_several_bytes_as_one_token_answers_from_codes(tmp_path):
    changes = merged()
    changes["model"] = replace(changes["model"], modalities=("table", "text"))  # quick to compile
    changes["task"] = replace(changes["task"], fields=("nodule_present", "texture"))
    checkpoint = write_checkpoint(tmp_path / "00000024", **changes)
    words = ["--to", "int8_weights", "--output", str(tmp_path / "codes"), "--calibration", "2", "--resamples", "2"]
    with (
        mock.patch.object(quantize_command, "make_mesh", lambda _: one_device()),
        mock.patch.object(quantize_command, "effect", wraps=quantize_command.effect) as measured,
    ):
        assert dispatch(["quantize", str(checkpoint.path), *words]) == 0
    config = Checkpoint(tmp_path / "codes").config()
    assert config.model.text_merge == 8 and config.model.quant == ("int8_weights",)
    layers = json.loads((tmp_path / "codes" / "report" / "report.json").read_text())["layers"]
    assert {layer["name"]: layer["scheme"] for layer in layers}["text/tokens/weight"] == "int8"
    _, floats, codes, *_ = measured.call_args.args
    for name, exact in floats.items():
        change = np.abs(codes[name] - exact).mean() / exact.std()  # of the mean: a token may go to another expert
        assert 0 < change < 0.1, (name, change)
