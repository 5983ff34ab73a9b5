"""A Hugging Face folder all the way: imported, scored, fine-tuned with adapters, scored, exported; and its text."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import AxisType
from safetensors.numpy import load_file

import eval as evaluate
import train
from r1jax.__main__ import dispatch
from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.hf.forward import logits_of, whole
from r1jax.hf.load import load_params, read_config
from r1jax.hf.save import save_params
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import find_checkpoint
from tests.hf.checkpoints import write_tokenizer
from tests.hf.test_save import random_params

LINES = [
    f"The {size} {animal} sees {n} 只猫." for size in ("old", "big") for animal in ("cat", "dog") for n in range(9)
]
DECODER = DecoderConfig(
    vocab_size=320,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=0,
)
FEW = ["--prompt", "The old", "--max_new_tokens", "6", "--page_size", "8"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs for one device compile in a fraction of the time."""
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        for module in ("train", "eval", "r1jax.serve.pretrained"):
            patch.setattr(f"{module}.make_mesh", lambda _: mesh)
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as `transformers` writes one, and its tokenizer files."""
    folder = tmp_path_factory.mktemp("published") / "deepseek-tiny"
    base = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64, "model_type": "deepseek_v3"}
    save_params(folder, DECODER, random_params(DECODER), base=base)
    return folder, write_tokenizer(folder, LINES, 300)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Text with a part of its own for training, validation and test."""
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in (("train", LINES[:24]), ("val", LINES[24:30]), ("test", LINES[30:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    output = tmp_path_factory.mktemp("imported") / "tiny"
    assert dispatch(["hf", "import", str(published[0]), str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def run(imported, texts, tmp_path_factory):
    """A few steps with adapters; the tokenizer is not named."""
    workdir = tmp_path_factory.mktemp("run")
    words = ["--config", f"configs/language.py:smoke,init={imported}", "--workdir", str(workdir)]
    words += ["--data.path", str(texts), "--model.lora_rank", "2", "--train.learning_rate", "0.01"]
    words += ["--train.steps", "4", "--train.warmup_steps", "1", "--train.eval_every", "4", "--train.ema", "0.5"]
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        assert train.main(words) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "out"
    assert dispatch(["hf", "export", str(run), str(output)]) == 0
    return output


def score(*words):
    assert evaluate.main([*map(str, words), "--resamples", "5", "--batch-size", "8"]) == 0


def tokenizer_files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name.startswith(("tokenizer", "chat"))}


def test_the_tokenizer_travels_byte_for_byte(published, imported, run, exported):
    folder, files = published
    assert len(files) == 3
    assert tokenizer_files(imported / "tokenizer") == files
    for checkpoint in (run / "checkpoints").glob("[0-9]*"):
        assert tokenizer_files(checkpoint / "tokenizer") == files
        Checkpoint(checkpoint).verify()
        assert set(json.loads((checkpoint / "manifest.json").read_text())) >= {f"tokenizer/{name}" for name in files}
    assert tokenizer_files(exported) == files
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((folder / name).read_text())


def test_adapters_alone_have_moved(published, run, exported):
    before, after = (load_file(path / "model.safetensors") for path in (published[0], exported))
    assert before.keys() == after.keys() and find_checkpoint(run).config().model.lora_rank == 2
    moved = {name.split(".", 3)[-1] for name in before if before[name].tobytes() != after[name].tobytes()}
    adapted = [f"self_attn.{part}.weight" for part in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")]
    assert moved > set(adapted) and not [name for name in moved if "norm" in name or ".experts." in name]
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=0.3)


def loss_of(folder, document):
    """Nats a predicted token and bits a byte of one document, with the tokenizers library alone."""
    config, library = read_config(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    params, ids = load_params(folder, config), [0, *library.encode(document).ids, 1]
    logits = logits_of(config, params, jnp.asarray([ids]), *whole(jnp.asarray([ids])))[0]
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    losses = [-log_p[place, token] for place, token in enumerate(ids[1:])]
    return np.mean(losses), np.sum(losses) / math.log(2) / len(document.encode())


def test_an_import_is_scored_with_its_own_tokenizer(published, imported, tmp_path, capsys):
    text = "The old cat sees 3 只猫.\nThe big dog."
    (tmp_path / "one.txt").write_text(text, "utf-8")
    score("--checkpoint", imported, "--data.path", tmp_path / "one.txt")
    metrics = json.loads((imported / "eval" / "metrics.json").read_text())
    loss, bits = loss_of(published[0], text)
    assert metrics["figures"]["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert metrics["figures"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    made = metrics["provenance"]
    assert made["trained_on"] is None and made["data"]["seen_in_training"] is None and metrics["warnings"] == []
    assert made["checkpoint"]["step"] == 0 and "(tokenizer.json)" in made["data"]["name"]
    assert "'all' is scored" in capsys.readouterr().err
    Checkpoint(imported).verify()
    with pytest.raises(UserError, match="is an import, which brings no data of its own: .* by --data.path"):
        score("--checkpoint", imported)


def test_the_run_is_scored_and_knows_what_it_has_seen(run, exported, texts, tmp_path):
    (tmp_path / "one.txt").write_text(LINES[0], "utf-8")
    score("--checkpoint", run, "--data.path", tmp_path / "one.txt", "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["figures"]["loss"]["value"] == pytest.approx(loss_of(exported, LINES[0])[0], rel=1e-4)
    assert metrics["provenance"]["data"]["seen_in_training"] == 1
    assert metrics["warnings"][0].startswith("1 of these 1 sequences hold text that was seen in training")


def test_all_of_them_say_the_same(published, imported, run, exported, capsys):
    said = {}
    count = len(tokenizers.Tokenizer.from_str(published[1]["tokenizer.json"].decode()).encode("The old")) + 1
    for name, folder in (("published", published[0]), ("import", imported), ("run", run), ("export", exported)):
        assert dispatch(["generate", str(folder), *FEW]) == 0
        shown = capsys.readouterr()
        said[name] = shown.out
        assert f"{count} tokens read" in shown.err
    assert said["published"] == said["import"] and said["run"] == said["export"]
    assert dispatch(["generate", str(imported), *FEW, "--dtype", "bfloat16", "--chat"]) == 0
    of_import = capsys.readouterr().out
    assert dispatch(["generate", str(published[0]), *FEW, "--dtype", "bfloat16", "--chat"]) == 0
    assert capsys.readouterr().out == of_import


def test_an_import_without_tokenizer_is_never_read_as_bytes(tmp_path, texts, published, capsys):
    decoder = replace(DECODER, vocab_size=1100, num_hidden_layers=1)
    save_params(tmp_path / "bare", decoder, random_params(decoder))
    assert dispatch(["hf", "import", str(tmp_path / "bare"), str(tmp_path / "in")]) == 0
    assert "without a tokenizer, since there is no tokenizer.json" in capsys.readouterr().out
    words = ["--checkpoint", tmp_path / "in", "--data.path", texts, "--data.split", "val"]
    with pytest.raises(UserError, match="1100 tokens is not that of bytes .259.: name .* by --data.tokenizer"):
        score(*words)
    with pytest.raises(UserError, match="beside the weights, and import them anew"):
        dispatch(["generate", str(tmp_path / "in"), *FEW])
    line = ["--config", f"configs/language.py:smoke,init={tmp_path / 'in'}", "--data.path", str(texts)]
    with pytest.raises(UserError, match="--train.init .*in has no tokenizer.json.*name .* by --data.tokenizer"):
        train.main([*line, "--workdir", str(tmp_path / "run")])
    score(*words, "--data.tokenizer", published[0], "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["figures"]["loss"]["value"] > 0 and "(tokenizer.json)" in metrics["provenance"]["data"]["name"]
