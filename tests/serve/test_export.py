"""`r1jax export --to jax`: what leaves says what the checkpoint says, without r1jax, or nothing leaves."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data import tokenizer
from r1jax.data.synthetic import SyntheticCases
from r1jax.edge.artefact import SUM, card_sum
from r1jax.errors import UserError
from r1jax.models.quantized import Use
from r1jax.ops.quantized_dot import Scheme
from r1jax.serve import export_command, export_jax
from r1jax.serve.export_codes import OwnCodes
from r1jax.serve.export_command import ExportArguments, Opened, export, limits_of, open_checkpoint
from r1jax.serve.export_gate import FP16, FP32, HALF, INT8, ROUNDED, compare
from r1jax.serve.export_graph import Port, tokenize
from r1jax.serve.export_medical import at_least, raw_inputs, standardise
from r1jax.tasks.medical.batch import collate
from r1jax.train.checkpoint import Checkpoint
from tests.serve.exported import export_to_jax, merged, write_checkpoint
from tests.train.tiny import get_config

WITHOUT_R1JAX = """
import json, sys
from pathlib import Path
for name in ("r1jax", "flax", "optax", "orbax"):
    sys.modules[name] = None  # importing it fails from here on
import jax, numpy as np
folder = Path(sys.argv[1])
card = json.loads((folder / "card.json").read_text())
program = jax.export.deserialize(bytearray((folder / card["file"]).read_bytes()))
inputs = dict(np.load(sys.argv[2]))
assert {name: (list(x.shape[1:]), str(x.dtype)) for name, x in inputs.items()} == {
    name: (port["shape"], port["dtype"]) for name, port in card["inputs"].items()
}
found = program.call(inputs)
np.savez(sys.argv[3], **{name: np.asarray(x) for name, x in found.items()})
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "00000024", **merged())


@pytest.fixture(scope="module")
def opened(checkpoint) -> Opened:
    return open_checkpoint(checkpoint, ExportArguments(checkpoint=str(checkpoint.path), output="", cases=12))


@pytest.fixture(scope="module")
def exported(opened, tmp_path_factory) -> Path:
    return export_to_jax(tmp_path_factory.mktemp("exported"), opened)


def ports_of(folder: Path) -> dict[str, Port]:
    card = json.loads((folder / "card.json").read_text())
    return {name: Port(**port | {"shape": tuple(port["shape"])}) for name, port in card["inputs"].items()}


def test_a_process_without_r1jax_gives_the_checkpoint_s_predictions(opened, exported, tmp_path):
    card = json.loads((exported / "card.json").read_text())
    np.savez(
        tmp_path / "in.npz", **raw_inputs(opened.exported.scored.source.read_batch(np.arange(12)), ports_of(exported))
    )
    script = tmp_path / "call.py"
    script.write_text(WITHOUT_R1JAX)
    files = [str(exported), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-I", str(script), *files], check=True)
    found = dict(np.load(tmp_path / "out.npz"))
    assert found.keys() == card["outputs"].keys()
    for name, expected in opened.exported.scored.predicted["both"].items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    called = {name for name in found if name.startswith("call.")}
    assert called == {"call.nodule_present", "call.malignancy"}
    for name in called:
        threshold = opened.exported.operating["both"][name.removeprefix("call.")].threshold
        np.testing.assert_array_equal(found[name], found[name.removeprefix("call.")] >= threshold)


def test_the_card_says_what_the_model_is(checkpoint, exported):
    card = json.loads((exported / "card.json").read_text())
    assert card["checkpoint"] == {"sha256": checkpoint.digest(), "step": 24, "name": "tiny"}
    assert card["notice"] == "Research software, not a medical device."
    assert "generated" in card["trained_on"]["notice"]
    assert card["platforms"] == ["cpu", "cuda"] and card["batch"] == "1 to 1024"
    assert card["inputs"]["volume"]["unit"] == "HU" and card["inputs"]["volume_spacing"]["unit"] == "mm"
    assert card["operating_points"]["image_only"]["nodule_present"]["threshold"] == 0.55
    assert card["agreement"]["decisions"] == {"same": 36, "required": 36, "of": 36}
    assert card[SUM] == card_sum(card)
    assert set(card["sha256"]) == {"model.jax"} and {file.name for file in exported.iterdir()} == {
        "card.json",
        "model.jax",
    }


@pytest.fixture(scope="module")
def run(exported):
    return export_jax.read_model(exported)


def test_a_threshold_between_two_scores_that_follow_each_other_parts_them():
    for low in np.random.default_rng(0).uniform(0, 1, 50).astype(np.float32):
        high = np.nextafter(low, np.float32(1))
        threshold = float(low) / 2 + float(high) / 2
        assert low < at_least(threshold) and high >= at_least(threshold) and at_least(float(low)) == low


@pytest.mark.parametrize("wrong", ["malignancy", "call.malignancy", "center_mm", "not finite"])
def test_a_model_that_says_something_else_does_not_agree(opened, exported, run, wrong):
    def spoiled(inputs):
        found, name = run(inputs), "texture" if wrong == "not finite" else wrong
        flipped = (1 - 2 * found["call.malignancy"]) * (np.arange(len(found["malignancy"])) == 0)
        changes = {"malignancy": 2e-5, "call.malignancy": flipped, "center_mm": 0.01, "not finite": np.nan}
        return found | {name: found[name] + changes[wrong]}

    agreement = compare(spoiled, opened.exported, FP32)
    assert not agreement["agrees"]
    named = agreement["findings"]["texture" if wrong == "not finite" else wrong.removeprefix("call.")]
    assert (named["largest_difference"] > named["limit"]) == (wrong != "call.malignancy")
    flips = 3 if wrong == "call.malignancy" else 0
    assert agreement["decisions"]["same"] == 36 - flips


@pytest.mark.parametrize(("limits", "agrees"), [(FP32, False), (HALF, True), (INT8, True)])
def test_rounding_is_let_through_where_numbers_are_narrow(opened, exported, run, limits, agrees):
    def rounded(inputs):
        found = run(inputs)
        return found | {"malignancy": found["malignancy"].astype(jnp.bfloat16).astype(np.float32)}

    agreement = compare(rounded, opened.exported, limits)
    assert agreement["agrees"] == agrees
    assert 1e-5 < agreement["findings"]["malignancy"]["largest_difference"] < 4e-3


def test_what_does_not_agree_does_not_leave(checkpoint, opened, exported, tmp_path, monkeypatch, capsys):
    agreement = json.loads((exported / "card.json").read_text())["agreement"] | {"agrees": False}

    def written(folder, *_):
        (folder / "model.jax").touch()
        return agreement

    monkeypatch.setattr(export_command, "open_checkpoint", lambda *_: opened)
    monkeypatch.setattr(export_command, "write", written)
    with pytest.raises(UserError, match="does not say what"):
        export([str(checkpoint.path), "--output", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []
    assert "36 of 36 same call" in capsys.readouterr().out


def test_the_host_s_part_and_the_graph_s_part_make_what_collate_makes():
    source = SyntheticCases(0, 8, "test", (16, 16, 16))
    raw = source.read_batch(np.arange(8))
    raw["text"] = ["", "a", "字", "x" * 13, "x" * 14, "x" * 15, "x" * 40, raw["text"][7]]
    raw["table"][1] = np.nan
    config = get_config()
    expected = collate(raw, config, ())
    wanted = {"table": Port((9,), "float32", "", ""), "text": Port((15,), "int32", "", "")}
    inputs = raw_inputs(raw, wanted)
    tokens, valid = tokenize(jnp.asarray(inputs["text"]), jnp.asarray(inputs["text_bytes"]))
    np.testing.assert_array_equal(valid, expected["text_valid"])
    np.testing.assert_array_equal(tokens, expected["text"])
    assert tokens[0].tolist() == [tokenizer.PAD] * 16
    record = standardise(jnp.asarray(inputs["table"]))
    np.testing.assert_allclose(record["table"], expected["table"], rtol=1e-6)
    np.testing.assert_array_equal(record["has_table"], expected["has_table"])


def test_grey_values_become_hounsfield_units():
    raw = {"case_id": ["a"], "image": np.array([[[0, 255, 51]]], np.uint8)}
    found = raw_inputs(raw, {"image": Port((1, 3), "float32", "HU", ""), "has_image": Port((), "bool", "1", "")})
    np.testing.assert_allclose(found["image"], [[[-1000, 400, -720]]], rtol=1e-6)
    assert found["has_image"].tolist() == [True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--output", "new"], "nowhere does not exist"),
        (["RUN", "--output", "new", "--weights", "int8"], "--weights int8 is of --to litert"),
        (["RUN", "--output", "."], "is there already"),
        (["RUN"], "no output was named"),
        (["RUN", "--output", "new", "--to", "onnx"], "one of jax, litert"),
        (["RUN", "--output", "new", "--to", "litert", "--converter", "nothing"], "--converter nothing is no file"),
        (["RUN", "--output", "new", "--to", "litert"], "add --install"),
        (["RUN", "--output", "new", "--to", "iree"], "the IREE compiler is not at .*: add --install"),
        (["RUN", "--output", "new", "--to", "iree", "--weights", "int8"], "--weights int8 is of --to litert"),
        (["RUN", "--output", "new", "--to", "iree", "--target-triple", "z80"], "--target-triple z80 is no Linux"),
        (["RUN", "--output", "new", "--target-cpu", "generic"], "are of --to iree: add that"),
        (["RUN", "--output", "new", "--target-triple", ""], "are of --to iree: add that"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(checkpoint, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "kept").touch()
    with pytest.raises(UserError, match=message) as caught:
        export([str(checkpoint.path) if word == "RUN" else word for word in words])
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_a_checkpoint_with_host_preprocessing_is_refused(tmp_path):
    data = get_config().data.__class__(val_cases=2, test_cases=2, preprocess="text_clean")
    checkpoint = write_checkpoint(tmp_path / "00000024", data=data)
    with pytest.raises(UserError, match="data.preprocess 'text_clean'"):
        open_checkpoint(checkpoint, ExportArguments(checkpoint=str(checkpoint.path), output="new"))


def test_hashed_words_are_refused_for_litert(tmp_path):
    model = dataclasses.replace(get_config().model, text_ngrams=16)
    checkpoint = write_checkpoint(tmp_path / "00000024", model=model)
    with pytest.raises(UserError, match="has model.text_ngrams 16, whose hashes LiteRT's converter refuses"):
        open_checkpoint(checkpoint, ExportArguments(checkpoint=str(checkpoint.path), output="new", to="litert"))


def test_a_device_is_held_to_the_checkpoint_in_its_own_precision(tmp_path):
    model = dataclasses.replace(get_config().model, precision="bf16_pure")
    checkpoint = write_checkpoint(tmp_path / "00000024", model=model)
    asked = ExportArguments(checkpoint=str(checkpoint.path), output="", cases=12, to="litert")
    edge = open_checkpoint(checkpoint, asked)
    assert edge.config.model == dataclasses.replace(model, precision="fp32")
    assert {leaf.dtype for leaf in jax.tree.leaves(edge.params)} == {np.dtype(np.float32)}
    run = jax.jit(edge.exported.graph(edge.task, edge.model, edge.params))
    agreement = compare(lambda inputs: jax.device_get(run(inputs)), edge.exported, limits_of(model, None, asked))
    assert agreement["findings"]["malignancy"]["largest_difference"] > 1e-5  # an fp32 copy would differ by less
    assert agreement["agrees"]


@pytest.mark.parametrize(
    ("to", "weights", "precision", "scheme", "limits"),
    [
        ("jax", "float", "fp32", None, FP32),
        ("jax", "float", "bf16", None, HALF),
        ("jax", "float", "fp32", Scheme("int8", "int8"), FP32),
        ("litert", "float", "fp32", None, FP32),
        ("litert", "float", "fp16", None, HALF),
        ("litert", "float", "fp32", Scheme("int8"), FP32),
        ("litert", "float", "fp32", Scheme("int8", "int8"), ROUNDED),
        ("iree", "float", "fp32", None, FP32),
        ("iree", "float", "bf16", None, HALF),
        ("iree", "float", "fp32", Scheme("int4"), FP32),
        ("iree", "float", "fp32", Scheme("int8", "int8"), ROUNDED),
        ("litert", "fp16", "bf16", None, FP16),
        ("litert", "fp16", "fp32", Scheme("int4"), FP16),
        ("litert", "fp16", "fp32", Scheme("int8", "int8"), ROUNDED),
        ("litert", "int8", "bf16", None, INT8),
        ("litert", "int8", "fp32", Scheme("int8"), FP16),
    ],
)
def test_limits_are_those_of_what_rounds(to, weights, precision, scheme, limits):
    trained = dataclasses.replace(get_config().model, precision=precision)
    codes = scheme and OwnCodes({}, {"x/weight": (Use("x/weight", "linear", (2, 2), None), scheme)})
    assert limits_of(trained, codes, ExportArguments(checkpoint="", output="", to=to, weights=weights)) == limits


def test_more_cases_than_the_program_takes_at_once_are_run_in_parts(tmp_path):
    """As finance reads 256 at a time, of which long texts leave a program fewer."""

    def graph(inputs):
        x = inputs["x"]
        return {"y": x * 2 if x.shape[0] * x.shape[1] <= 2 * export_jax.LARGEST else -x}

    largest, _ = export_jax.write_model(tmp_path, graph, {"x": Port((8,), "float32", "", "")})
    assert largest == export_jax.LARGEST // 4
    x = np.arange(8 * (2 * largest + 3), dtype=np.float32).reshape(-1, 8)
    np.testing.assert_array_equal(export_jax.read_model(tmp_path, largest)({"x": x})["y"], 2 * x)


def test_a_full_disk_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="No space left"), export_command.draft_folder(tmp_path / "new") as folder:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
