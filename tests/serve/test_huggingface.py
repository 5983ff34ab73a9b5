"""The commands `r1jax hf ...`, called as the console script calls them."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax.__main__ import dispatch
from r1jax.config import Config, ModelConfig
from r1jax.data.tokenizer_files import byte_files
from r1jax.errors import UserError
from r1jax.hf.load import load_params, read_config
from r1jax.serve import huggingface
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import CheckpointFolder
from tests.hf.checkpoints import stored, write_folder

RUN = {"step": 5, "validation": None, "data": {"name": "texts", "fingerprint": "0" * 64}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder of each stored checkpoint."""
    made = {}
    for arch in ("v3", "v2"):
        published, tensors, arrays = stored(arch)
        made[arch] = write_folder(tmp_path_factory.mktemp("sources") / arch, published, tensors)
        np.savez(made[arch] / "reference.npz", input_ids=arrays["input_ids"], logits=arrays["logits"])
    (made["v3"] / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}')
    return made


@pytest.fixture(scope="module")
def imported(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("imported") / "r1"
    assert dispatch(["hf", "import", str(sources["v3"]), str(output)]) == 0
    return output


def call(line, *paths):
    return dispatch([*line.split(), *map(str, paths)])


def test_import_makes_a_sealed_checkpoint(imported, sources):
    checkpoint = Checkpoint(imported)
    checkpoint.verify()
    decoder = checkpoint.config().model.decoder
    assert decoder == read_config(sources["v3"]) and decoder.num_nextn_predict_layers == 1
    meta = checkpoint.meta()
    assert meta["hugging_face"]["config"] == json.loads((sources["v3"] / "config.json").read_text())
    assert {"versions", "git", "command", "validation"} <= meta.keys()
    expected = load_params(sources["v3"], decoder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), checkpoint.restore_decoder(), expected)


def test_export_gives_the_imported_files_back(imported, sources, tmp_path, capsys):
    assert call("hf export", imported, tmp_path / "out", "--shard-bytes", 20_000) == 0
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    original = load_file(sources["v3"] / "model.safetensors")
    copies = tensors.keys() - original.keys()
    assert {name.split(".", 3)[3] for name in copies} == {"embed_tokens.weight", "shared_head.head.weight"}
    assert all(tensors[name].tobytes() == value.tobytes() for name, value in original.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((sources["v3"] / "config.json").read_text())
    assert {k for k, v in original.items() if config.get(k, v) != v} <= {"dtype", "architectures"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.6, "top_p": 0.95}
    assert "parameters" in capsys.readouterr().out


def test_mtp_is_left_out_where_asked(imported, sources, tmp_path):
    assert call("hf export", imported, tmp_path / "out", "--mtp", "False", "--dtype", "bfloat16") == 0
    assert read_config(tmp_path / "out").num_nextn_predict_layers == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in tensors if name.startswith("model.layers.3.")]
    assert {str(v.dtype) for n, v in tensors.items() if "mlp.gate." not in n} == {"bfloat16"}
    assert call("hf import", sources["v3"], tmp_path / "in", "--mtp=False", "--dtype=float16") == 0
    params = Checkpoint(tmp_path / "in").restore_decoder()
    assert "mtp" not in params and params["embed_tokens"].dtype == np.float16


@pytest.mark.parametrize("averaged", [False, True])
def test_training_checkpoints_are_exported(tmp_path, sources, averaged):
    decoder = read_config(sources["v2"])
    params = load_params(sources["v2"], decoder)
    other = jax.tree.map(lambda x: x + 1, params)
    encoder = {"weight": jnp.ones(3)}
    state = {"step": jnp.int32(5), "params": {"decoder": other if averaged else params, "encoder": encoder}}
    state |= {"ema": {"decoder": params, "encoder": encoder} if averaged else {}}
    config = Config(model=ModelConfig(decoder=decoder))
    CheckpointFolder(tmp_path / "run" / "checkpoints").save(5, state, config, RUN)
    assert call("hf export", tmp_path / "run", tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_file(sources["v2"] / "model.safetensors").items():
        np.testing.assert_array_equal(exported[name], value, strict=True)
    assert read_config(tmp_path / "out") == decoder
    exported = {name: (tmp_path / "out" / name).read_bytes() for name in byte_files()}
    assert exported == byte_files()  # a run that names no tokenizer has read bytes
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"], told["pad_token_id"]) == (1, 2, 0)


@pytest.mark.parametrize(("merge", "kinds", "told"), [(8, ("text", "table"), 1), (1, ("text",), 0), (8, ("table",), 0)])
def test_a_decoder_that_never_read_a_byte_as_a_token_is_said(tmp_path, sources, capsys, merge, kinds, told):
    decoder = read_config(sources["v2"])
    config = Config(model=ModelConfig(decoder=decoder, modalities=kinds, text_merge=merge))
    state = {"params": {"decoder": load_params(sources["v2"], decoder)}}
    saved = CheckpointFolder(tmp_path / "run" / "checkpoints").save(5, state, config, RUN)
    assert call("hf export", tmp_path / "run", tmp_path / "out") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == told
    assert all(
        note.startswith(f"note: model.text_merge of {saved.path} is 8: in this run its decoder has read")
        for note in notes
    )


def test_adapters_are_merged_into_what_is_exported(tmp_path, sources):
    decoder = read_config(sources["v2"])
    params = load_params(sources["v2"], decoder)
    adapted = params["layers_0"]["self_attn"]["o_proj"]
    out, into = adapted["weight"].shape
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, into), (out, 2))))
    adapted |= {"lora_a": a, "lora_b": b}
    config = Config(model=ModelConfig(decoder=decoder, lora_rank=2, lora_alpha=3.0))
    state = {"params": {"decoder": params}}
    CheckpointFolder(tmp_path / "run" / "checkpoints").save(5, state, config, RUN)
    assert call("hf export", tmp_path / "run", tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_file(sources["v2"] / "model.safetensors").items():
        if name == "model.layers.0.self_attn.o_proj.weight":
            value = value + 1.5 * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
            np.testing.assert_allclose(exported[name], value, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(exported[name], value, strict=True)


def test_checkpoints_without_decoder_are_refused(tmp_path):
    state = {"params": {"encoder": {"weight": jnp.ones(3)}}}
    CheckpointFolder(tmp_path / "run" / "checkpoints").save(5, state, Config(), {"step": 5, "validation": None})
    with pytest.raises(UserError, match="holds no decoder"):
        call("hf export", tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("arch", ["v3", "v2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_logits(sources, tmp_path, arch, batch_size):
    reference = np.load(sources[arch] / "reference.npz")
    ids, expected = (np.concatenate([reference[name]] * 2) for name in ("input_ids", "logits"))
    np.save(tmp_path / "ids.npy", ids)
    output = tmp_path / "logits.npy"
    files = ["--input", tmp_path / "ids.npy", "--output", output]
    assert call(f"hf logits --batch-size {batch_size}", sources[arch], *files) == 0
    logits = np.load(output)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "logits.npy"]


def test_logits_in_bfloat16_are_near(sources, tmp_path):
    reference = np.load(sources["v2"] / "reference.npz")
    np.save(tmp_path / "ids.npy", reference["input_ids"])
    files = ["--input", tmp_path / "ids.npy", "--output", tmp_path / "logits.npy"]
    assert call("hf logits --dtype bfloat16", sources["v2"], *files) == 0
    difference = np.abs(np.load(tmp_path / "logits.npy") - reference["logits"])
    assert 1e-4 < np.median(difference) < 0.05


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (np.array([[0, 48]]), r"token 48 at \[0, 1\] is outside the vocabulary of 48 tokens"),
        (np.array([[0, 1], [-1, 1]]), r"token -1 at \[1, 0\]"),
        (np.zeros((1, 2), np.float32), r"holds float32 \[1, 2\], but it must be int32 \[B, T\]"),
        (np.zeros(2, np.int32), r"holds int32 \[2\]"),
        (np.zeros((0, 2), np.int32), "not empty"),
        (b"nonsense", "is no .npy file"),
        (b"", "is no .npy file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_tokens_that_are_none(sources, tmp_path, tokens, told):
    path = tmp_path / "ids.npy"
    if isinstance(tokens, bytes):
        path.write_bytes(tokens)
    elif tokens is not None:
        np.save(path, tokens)
    with pytest.raises(UserError, match=told):
        call("hf logits", sources["v3"], "--input", path, "--output", tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()


def test_logits_that_cannot_be_written(sources, tmp_path, monkeypatch):
    np.save(tmp_path / "ids.npy", np.zeros((1, 2), np.int32))
    for output in (tmp_path, tmp_path / "nowhere" / "out.npy"):
        with pytest.raises(UserError, match="must be a file in a folder that exists"):
            call("hf logits", sources["v2"], "--input", tmp_path / "ids.npy", "--output", output)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface.os, "replace", full)
    with pytest.raises(UserError, match=r"out.npy cannot be written \(No space left on device\)"):
        call("hf logits", sources["v2"], "--input", tmp_path / "ids.npy", "--output", tmp_path / "out.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]


def test_verify_tells_by_exit_code(sources, tmp_path, capsys):
    assert call("hf verify", sources["v2"]) == 0
    assert " ok" in capsys.readouterr().out
    folder = shutil.copytree(sources["v2"], tmp_path / "wrong")
    arrays = dict(np.load(folder / "reference.npz"))
    np.savez(folder / "reference.npz", **arrays | {"logits": arrays["logits"] + np.float32(1e-4)})
    assert call("hf verify", folder) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["hf import", "hf export"])
def test_outputs_are_never_overwritten(sources, imported, tmp_path, command):
    (tmp_path / "mine").write_text("x")
    source = sources["v3"] if command == "hf import" else imported
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="exists and is not empty"):
            call(command, source, path)
    assert (tmp_path / "mine").read_text() == "x"


def test_a_full_disk_is_one_sentence(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"could not be written \(No space left on device: .* MiB are needed\)"):
        call("hf import", sources["v2"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(imported, tmp_path):
    broken = shutil.copytree(imported, tmp_path / "broken")
    (broken / "config.json").write_text("{}")
    with pytest.raises(UserError):
        call("hf export", broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("most", "length"), [(64, 64), (1 << 20, 1024), (1, 1024), ("many", 1024)])
def test_an_import_is_scored_in_sequences_that_it_can_read(sources, tmp_path, most, length):
    folder = shutil.copytree(sources["v2"], tmp_path / "x")
    published = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(published | {"max_position_embeddings": most}))
    assert call("hf import", folder, tmp_path / "in") == 0
    assert Checkpoint(tmp_path / "in").config().model.text_tokens == length


def test_settings_that_a_weights_only_checkpoint_has(imported):
    config = Checkpoint(imported).config()
    assert (config.name, config.task.name, config.train.ema) == ("v3", "language", 0)
    expected = replace(Config().model, modalities=("text",), decoder=config.model.decoder, text_tokens=1024)
    assert config.model == expected
    assert huggingface.SHARD_BYTES == 5e9
