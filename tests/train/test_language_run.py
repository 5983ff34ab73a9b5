"""The language task through the same engine: schedules, loads, resume, weights to start from, adapters."""

import json
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.models.lora import split_adapters
from r1jax.tasks.task import Task
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.closing import closing_table
from r1jax.train.optimizer import BALANCE_BIAS
from r1jax.train.run import open_run, restore_or_init
from r1jax.train.start import start_from, start_record
from r1jax.train.step import NO_LIMIT
from tests.train.experiment import CLOCK, Interrupted, make_experiment


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(a, b):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def text():
    return make_experiment(file="tiny_language.py")


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    """Folder and last state of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("language")
    state, said, _ = text.train(workdir)
    assert said == []
    return workdir, jax.device_get(state)


def test_tasks_satisfy_the_protocol(tiny, text):
    assert isinstance(tiny.task, Task) and isinstance(text.task, Task)


def test_the_language_model_is_the_decoder_alone(text):
    assert text.fresh.params.keys() == {"decoder"}


def test_resume_is_bit_identical(text, done, tmp_path):
    text.train(tmp_path, step=Interrupted(text.step, 3, signal.SIGTERM))
    state, said, _ = text.train(tmp_path)
    assert said == [f"goes on from {tmp_path / 'checkpoints' / '00000003'}"]
    assert same(state, done[1]) and rows(tmp_path) == rows(done[0])


def test_validation_says_how_every_expert_was_used(text, done):
    config, last = text.config, rows(done[0])[-1]
    assert last["step"] == 6 and np.isfinite(last["validation.text.loss"])
    tokens, sequences = config.model.text_tokens, len(text.validation)
    valid = sum(text.validation.read_batch(np.arange(sequences))["text_valid"].sum(axis=1))
    k = config.model.decoder.num_experts_per_tok
    loads = [last[f"validation.text.load.{i}"] for i in (0, 1)]  # the layer, and MTP's
    assert [sum(load) for load in loads] == [valid * k, (valid - sequences) * k] and valid < sequences * tokens
    for i, load in enumerate(loads):
        assert last[f"validation.text.violation.{i}"] == pytest.approx(max(load) / np.mean(load) - 1)
    assert last["validation.text.perplexity"] == pytest.approx(np.exp(last["validation.text.loss"]))


def test_closing_table(text, done):
    config = replace(text.config, workdir=str(done[0]))
    with open_run(config) as run:
        said = closing_table(run, text.task, text.validation)
    assert "nats/token, the entropy of the generator" in said and "tokens seen      264" in said  # 6 x 4 x 11
    assert "validation sequences, step 6" in said


def test_biases_stop_and_the_weight_of_mtp_falls(text):
    """Of six steps the first three move the biases and weigh MTP by 0.3, the others by 0.1."""
    state, found = text.init(), []
    bias = lambda state: [x for name, x in leaves(state.params).items() if BALANCE_BIAS in name]  # noqa: E731
    before = bias(state)
    for batch in text.batches(6):
        state, metrics = text.step(state, batch, NO_LIMIT)
        m = {name: float(x) for name, x in metrics.items()}
        weight = (m["loss"] - m["loss.next"] - 2e-4 * m["loss.balance"]) / m["loss.mtp"]  # two layers of 1e-4
        after = bias(state)
        found.append((round(weight, 3), any(np.any(a != b) for a, b in zip(before, after, strict=True))))
        before = after
    assert found == [(0.3, True)] * 3 + [(0.1, False)] * 3


def restore(experiment, workdir, model=None, **changes):
    """What a new run in a folder starts from."""
    config = replace(experiment.config, workdir=str(workdir), **changes)
    with open_run(config) as run:
        e = experiment
        return restore_or_init(config, run, model or e.model, e.task, e.mesh, e.source, e.batch)


def test_weights_of_a_run_are_taken(text, done, tmp_path):
    train = replace(text.config.train, init=str(done[0]))
    state, said = restore(text, tmp_path, train=train)
    assert same(state.params, done[1].ema) and same(state.ema, done[1].ema) and int(state.step) == 0
    assert same(state.optimizer, text.fresh.optimizer)
    count = len(leaves(state.params))
    assert said == [f"starts from {done[0] / 'checkpoints' / '00000006'}: {count} of {count} arrays taken"]


def test_meta_says_where_the_weights_came_from_and_a_resume_ignores_it(text, done, tmp_path):
    begun = replace(text, config=replace(text.config, train=replace(text.config.train, init=str(done[0]))))
    begun.train(tmp_path, step=Interrupted(text.step, 2, signal.SIGTERM))
    record = CheckpointFolder(tmp_path / "checkpoints").all()[-1].meta()["init"]
    assert record["path"] == str(done[0]) and record["left"] == [] and len(record["sha256"]) == 64
    gone = replace(text, config=replace(text.config, train=replace(text.config.train, init="nowhere")))
    _, said, _ = gone.train(tmp_path)
    assert said == [f"goes on from {tmp_path / 'checkpoints' / '00000002'}"]
    assert CheckpointFolder(tmp_path / "checkpoints").all()[-1].meta()["init"] == record


def weights_only(folder, text, params):
    """A checkpoint of weights alone, in half precision, as an import writes it."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    meta = {"step": 0, "validation": None, "hugging_face": {"config": {"eos_token_id": 1}}}
    return CheckpointFolder(folder).save(0, {"params": half}, text.config, meta).path


def test_what_does_not_fit_is_left(text, done, tmp_path):
    decoder = dict(done[1].params["decoder"])
    decoder["embed_tokens"] = decoder["embed_tokens"][:-1]
    decoder["surplus"] = np.zeros(3, np.float32)
    del decoder["norm"]
    path = weights_only(tmp_path / "given", text, {"decoder": decoder})
    state, said = start_from(str(path), text.init(), text.config.model, tmp_path)
    left = {"decoder.embed_tokens", "decoder.norm.weight"}
    for name, x in leaves(state.params).items():
        given = leaves(done[1].params)[name]
        plain = name.replace("['", ".").replace("']", "").lstrip(".")
        expected = leaves(text.fresh.params)[name] if plain in left else np.asarray(jnp.asarray(given, jnp.bfloat16))
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected.astype(np.float32), err_msg=name)
    assert said[1:] == [
        "  freshly initialised: decoder.embed_tokens, decoder.norm.weight",
        "  not used: decoder.embed_tokens, decoder.surplus",
    ]
    record = start_record(tmp_path)
    assert record["hugging_face"] == {"config": {"eos_token_id": 1}}
    assert record["init"]["left"] == sorted(left) and record["init"]["weights"] == "params"


def test_nothing_to_start_from(text, tmp_path):
    path = weights_only(tmp_path / "given", text, {"other": {"weight": np.zeros((2, 3), np.float32)}})
    with pytest.raises(UserError, match="none of the 1 arrays .* fits this model .the first is other.weight."):
        start_from(str(path), text.init(), text.config.model, tmp_path)
    with pytest.raises(UserError, match="--train.init .*nowhere does not exist"):
        start_from(str(tmp_path / "nowhere"), text.init(), text.config.model, tmp_path)


def test_only_adapters_are_trained(text, done, tmp_path):
    flags = ("--model.lora_rank", "2", "--train.init", str(done[0]), "--train.steps", "3")
    adapted = make_experiment(*flags, file="tiny_language.py")
    state, said, _ = adapted.train(tmp_path)
    assert "lora_a" in said[1] and "freshly initialised" in said[1]
    adapters, base = split_adapters(jax.device_get(state.params))
    averaged, averaged_base = split_adapters(jax.device_get(state.ema))
    assert same(base, done[1].ema) and same(averaged_base, done[1].ema)
    moved = [np.any(x) for name, x in leaves(adapters).items() if "lora_b" in name]
    assert moved and all(moved) and not same(adapters, averaged)
    size = sum(x.size for x in jax.tree.leaves(adapters))
    held = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert held == 2 * size < 2 * sum(x.size for x in jax.tree.leaves(base))


def test_adapters_are_not_lost_at_a_start(text, done, tmp_path):
    adapted = replace(text.config, model=replace(text.config.model, lora_rank=2, lora_alpha=3.0))
    meta = {"step": 0, "validation": None}
    path = CheckpointFolder(tmp_path / "given").save(0, {"params": done[1].params}, adapted, meta).path
    for model in (text.config.model, replace(adapted.model, lora_alpha=1.0)):
        with pytest.raises(UserError, match="model.lora_rank 2, model.lora_alpha 3.: set both alike"):
            start_from(str(path), text.init(), model, tmp_path)


def test_softmax_routers_have_no_bias_to_move(tmp_path):
    flags = ("--model.decoder.scoring_func", "softmax", "--train.steps", "3")
    state, _, _ = make_experiment(*flags, file="tiny_language.py").train(tmp_path)
    biases = [x for name, x in leaves(state.params).items() if "e_score_correction_bias" in name]
    assert biases and not np.any(biases)
