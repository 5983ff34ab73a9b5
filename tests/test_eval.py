import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from sklearn.metrics import brier_score_loss, roc_auc_score

import eval as command
import train
from r1jax.arguments import EvalArguments, EvalData
from r1jax.data.folder import folder_fingerprint
from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.parallel.mesh import make_mesh
from r1jax.serve.evaluate import scoring_config
from r1jax.serve.structured import from_xml
from r1jax.tasks.medical.schema import FINDINGS
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.evaluation import Evaluator

ROOT = Path(__file__).resolve().parents[1]
CASES = 24
TINY = [
    "--model.volume.size=16,16,16",
    "--model.volume.widths=8,16",
    "--model.volume.blocks=1,1",
    "--model.volume.layers=0",
    "--model.volume.stem_stride=4",
    "--model.table.layers=0",
    "--model.text_tokens=8",
    "--model.decoder.num_hidden_layers=1",
    "--model.decoder.hidden_size=16",
    "--model.decoder.moe_intermediate_size=8",
    "--model.decoder.num_nextn_predict_layers=0",
    "--task.text_weight=0",
    "--data.train_cases=16",
    "--data.val_cases=16",
    "--data.test_cases=24",
    "--train.steps=2",
    "--train.warmup_steps=1",
    "--train.eval_every=2",
    "--train.ema=0",
]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs for one device compile in a fraction of the time."""

    def make_mesh(_config):
        return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", make_mesh)
        patch.setattr(command, "make_mesh", make_mesh)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run, evaluated once."""
    workdir = tmp_path_factory.mktemp("run")
    config = ["--config", str(ROOT / "configs/medical.py") + ":smoke"]
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        assert train.main([*config, *TINY, "--workdir", str(workdir)]) == 0
    words = ["--checkpoint", str(workdir), "--batch-size", "16", "--pictures", "4", "--resamples", "20"]
    assert command.main(words) == 0
    return workdir


@pytest.fixture(scope="module")
def metrics(run) -> dict:
    return json.loads((run / "eval/metrics.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(run) -> Checkpoint:
    return Checkpoint(next((run / "checkpoints").glob("[0-9]*")))


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoint.path, tmp_path / "copy" / checkpoint.path.name))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Volumes without any record, half of them marked for training."""
    rng = np.random.default_rng(0)
    path = tmp_path / "cases"
    path.mkdir()
    np.savez(
        path / "cases.npz",
        volume=rng.integers(0, 255, (20, 20, 16, 12), np.uint8),
        nodule_present=(np.arange(20) % 2).astype(np.float32),
        case_id=np.array([f"患者 {i}" for i in range(20)]),
        split=np.array(["train", "test"] * 10),
        group=np.array([f"scan {i // 4}" for i in range(20)]),
    )
    return path


def score(*words: object) -> int:
    return command.main(["--pictures", "0", "--resamples", "5", "--batch-size", "16", *map(str, words)])


def bundle(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def probability(tree: dict, text: str) -> float | None:
    for entry in tree["entry"]:
        if entry["resource"].get("code", {}).get("text") == f"{text}: probability":
            return entry["resource"]["valueQuantity"]["value"]
    return None


def parse_by_peer(text: str) -> Any:
    """Validates a bundle with fhir.resources, which reads the published FHIR R4B definitions; XML or JSON."""
    pytest.importorskip("fhir.resources", reason="the schema is in the extra r1jax[medical]")
    from fhir.resources.R4B.bundle import Bundle

    if text.startswith("<?xml"):
        return Bundle.model_validate_xml(text.encode())
    return Bundle.model_validate_json(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_figures_follow_from_the_reports_and_the_generator(run, metrics):
    cases = SyntheticCases(0, CASES, "test", (16, 16, 16))
    trees = [bundle(run / f"eval/reports/synthetic-test-{i:06d}.json") for i in range(CASES)]
    scores = np.array([probability(tree, FINDINGS[0].text) for tree in trees])
    labels = np.array([cases.patient(i).nodule is not None for i in range(CASES)])
    entry = metrics["both"]["findings"]["nodule_present"]
    assert entry["n"] == CASES and entry["positives"] == labels.sum()
    assert entry["auc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert entry["brier"]["value"] == pytest.approx(brier_score_loss(labels, scores))
    called = np.array(["present (at or above" in json.dumps(tree) for tree in trees])
    counts = entry["operating_point"]["counts"]
    assert counts["true_positive"] == (called & labels).sum()
    assert counts["false_positive"] == (called & ~labels).sum()


def test_each_mode_has_its_frozen_threshold_and_its_ceiling(metrics, checkpoint):
    ceilings = SyntheticCases(0, CASES, "test", (16, 16, 16)).ceilings()
    for mode, name in (("both", "both"), ("image_only", "image"), ("record_only", "record")):
        for finding, point in checkpoint.meta()["validation"]["operating_points"][mode].items():
            found = metrics[mode]["findings"][finding]["operating_point"]
            assert (found["threshold"], found["origin"]) == (point["threshold"], "set on validation")
        assert metrics[mode]["findings"]["malignancy"]["ceiling"] == ceilings[name]
        assert metrics[mode]["findings"].keys() == {finding.name for finding in FINDINGS}
    both, alone = (metrics[mode]["findings"]["malignancy"]["auc"]["value"] for mode in ("both", "record_only"))
    assert metrics["differences"]["record_only"]["malignancy"]["auc"]["value"] == pytest.approx(both - alone)


def test_the_number_of_devices_changes_no_figure(run, metrics, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "make_mesh", make_mesh)
    words = ["--checkpoint", run, "--batch-size", 20, "--pictures", 2, "--resamples", 2, "--output", tmp_path / "out"]
    assert command.main(list(map(str, words))) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    for name, key in (("nodule_present", "brier"), ("texture", "mae"), ("center_mm", "mean_error")):
        value = found["both"]["findings"][name][key]["value"]
        assert value == pytest.approx(metrics["both"]["findings"][name][key]["value"], rel=1e-4)


def test_provenance_says_what_was_scored(metrics, checkpoint):
    made = metrics["provenance"]
    source = SyntheticCases(0, CASES, "test", (16, 16, 16))
    manifest = checkpoint.path / "manifest.json"
    assert made["checkpoint"] == {
        "path": f"checkpoints/{checkpoint.path.name}",
        "step": 2,
        "sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
    }
    assert made["data"]["fingerprint"] == source.fingerprint
    assert made["data"]["synthetic"] and made["data"]["cases"] == CASES and made["data"]["split"] == "test"
    assert made["trained_on"]["fingerprint"] == SyntheticCases(0, 16, "train", (16, 16, 16)).fingerprint
    assert made["data"]["seen_in_training"] == 0 and metrics["warnings"] == []


def test_every_case_has_a_valid_report(run, checkpoint):
    reports = run / "eval/reports"
    expected = {f"synthetic-test-{i:06d}.{kind}" for i in range(CASES) for kind in ("json", "xml")}
    assert {path.name for path in reports.iterdir()} == expected
    for i in (0, 11, 23):
        found = parse_by_peer((reports / f"synthetic-test-{i:06d}.json").read_text("utf-8"))
        assert found.entry[0].resource.status == "preliminary"
        assert checkpoint.digest() in found.model_dump_json() and "HTEST" in found.model_dump_json()
        tree = bundle(reports / f"synthetic-test-{i:06d}.json")
        assert from_xml((reports / f"synthetic-test-{i:06d}.xml").read_text("utf-8")) == tree
    assert len({bundle(path)["timestamp"] for path in reports.glob("*.json")}) == 1


def test_xml_reports_are_valid_too(run):
    pytest.importorskip("lxml", reason="the XML reader is in the extra r1jax[medical]")
    for i in (0, 11, 23):
        found = parse_by_peer((run / f"eval/reports/synthetic-test-{i:06d}.xml").read_text("utf-8"))
        assert found.entry[0].resource.status == "preliminary"


def test_page_needs_nothing_else_and_shows_the_cases(run):
    page = (run / "eval/index.html").read_text("utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:|#)|url\((?!#|data:)|@import', page)
    assert "SYNTHETIC DATA" in page
    cases = re.findall(r'<article class="case".*?</article>', page, re.S)
    assert 1 <= len(cases) <= 4
    assert all("axial + saliency" in case and "Preliminary" in case for case in cases)


def test_the_console_shows_the_figures_and_the_paths(run, tmp_path, capsys):
    assert score("--checkpoint", run, "--output", tmp_path / "out", "--data.split", "train") == 0
    said = capsys.readouterr().out
    assert "synthetic" in said and "AUC gained by having both" in said
    assert str(tmp_path / "out" / "index.html") in said
    assert "warning: 16 of these 16 cases were seen in training" in said


def test_cases_chosen_by_validation_are_called_optimistic(run, tmp_path):
    score("--checkpoint", run, "--output", tmp_path / "out", "--data.split", "val")
    (warning,) = json.loads((tmp_path / "out/metrics.json").read_text())["warnings"]
    assert "optimistic" in warning and warning in (tmp_path / "out/index.html").read_text("utf-8").split("<nav")[0]


def test_a_folder_of_pictures_alone_is_scored_as_such(run, folder, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert score("--checkpoint", run, "--data.path", folder, "--output", out, "--language", "zh") == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found.keys() >= {"image_only"} and not found.keys() & {"both", "record_only"}
    point = found["image_only"]["findings"]["nodule_present"]["operating_point"]
    frozen = checkpoint.meta()["validation"]["operating_points"]["image_only"]["nodule_present"]
    assert point["threshold"] == frozen["threshold"]
    assert found["provenance"]["data"]["cases"] == 20 and not found["provenance"]["data"]["synthetic"]
    assert found["image_only"]["interval"].endswith("over groups")
    assert found["warnings"] == []
    assert f"not given: 'all' is scored, as the checkpoint was not trained on {folder}" in capsys.readouterr().err
    report = (out / "reports/患者 1.json").read_text("utf-8")
    assert "HTEST" not in report and "缺失的输入" in report
    assert "SYNTHETIC" not in (out / "index.html").read_text("utf-8")


def test_a_part_of_a_folder_is_scored_where_it_is_named(run, folder, tmp_path, capsys):
    score("--checkpoint", run, "--data.path", folder, "--output", tmp_path / "out", "--data.split", "test")
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found["provenance"]["data"]["cases"] == 10 and found["warnings"] == []
    assert "not given" not in capsys.readouterr().err


@pytest.mark.parametrize(("trained_on", "scored"), [("same path", "test"), ("copy", "test"), ("other", "all")])
def test_the_part_of_the_training_folder_stays_that_of_the_config(copied, folder, tmp_path, capsys, trained_on, scored):
    config, meta = (json.loads((copied / name).read_text()) for name in ("config.json", "meta.json"))
    config["data"] |= {"path": str(folder / ".." / folder.name), "split": "test"}
    other = shutil.copytree(folder, tmp_path / "twin")
    if trained_on != "same path":
        config["data"]["path"] = str(tmp_path)
        meta["data"]["fingerprint"] = folder_fingerprint(folder) if trained_on == "copy" else "0" * 64
    for name, content in (("config.json", config), ("meta.json", meta)):
        (copied / name).write_text(json.dumps(content))
    path = str(folder if trained_on == "same path" else other)
    found = scoring_config(Checkpoint(copied), EvalArguments(str(copied), data=EvalData(path=path)))
    assert (found.data.path, found.data.split) == (path, scored)
    assert f"not given: {scored!r} is scored" in capsys.readouterr().err


def test_a_crash_leaves_the_earlier_result_as_it_was(run, monkeypatch):
    before = contents(run / "eval")

    def half(_run, _evaluator, _params, _source, folder):
        (folder / "metrics.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(command.RESULTS, "medical", half)
    with pytest.raises(UserError, match="No space left"):
        score("--checkpoint", run)
    assert contents(run / "eval") == before
    assert [path for path in run.iterdir() if path.name.startswith(".eval")] == []


def test_a_new_result_replaces_the_earlier_one_whole(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    (out / "reports").mkdir(parents=True)
    (out / "reports/stale.json").write_text("{}")
    score("--checkpoint", run, "--output", out)
    assert not (out / "reports/stale.json").exists()
    assert len(list((out / "reports").iterdir())) == 2 * CASES


def test_predictions_that_are_not_finite_name_the_case(run, monkeypatch, tmp_path):
    predict = Evaluator.predict

    def broken(*args, **kwargs):
        predicted, targets, ids = predict(*args, **kwargs)
        predicted["record_only"]["center_mm"][7, 1] = np.nan
        return predicted, targets, ids

    monkeypatch.setattr(Evaluator, "predict", broken)
    with pytest.raises(UserError, match=r"case 'synthetic-test-000007'.*center_mm \(record_only\).*not finite"):
        score("--checkpoint", run, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_validation_the_threshold_is_set_here_and_said_so(copied, tmp_path):
    meta = json.loads((copied / "meta.json").read_text())
    (copied / "meta.json").write_text(json.dumps(meta | {"validation": None}))
    seal(copied)
    score("--checkpoint", copied, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "set on this split" in found["both"]["findings"]["nodule_present"]["operating_point"]["origin"]
    assert "no operating point of malignancy, nodule_present" in found["warnings"][0]
    reports = "".join(path.read_text() for path in (tmp_path / "out/reports").glob("*.json"))
    assert "set on the cases of this evaluation" in reports


def seal(checkpoint: Path) -> None:
    """Rewrites the manifest, as if the checkpoint had been saved like this."""
    names = json.loads((checkpoint / "manifest.json").read_text())
    sums = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / "manifest.json").write_text(json.dumps(sums))


def test_a_truncated_checkpoint_is_refused_before_anything_is_written(copied):
    largest = max((p for p in copied.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        score("--checkpoint", copied)
    assert {path.name for path in copied.parent.iterdir()} == {copied.name}


def test_arrays_of_another_config_are_refused(copied, tmp_path):
    text = (copied / "config.json").read_text()
    changed = json.loads(text)
    changed["model"]["volume"]["widths"] = [8, 24]
    (copied / "config.json").write_text(json.dumps(changed))
    seal(copied)
    with pytest.raises(UserError, match=r"does not fit its own config.json: the array (ema|params)\.volume"):
        score("--checkpoint", copied, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_says_what_to_do(run, folder, tmp_path):
    empty, notes = tmp_path / "empty", tmp_path / "notes"
    empty.mkdir()
    notes.mkdir()
    (notes / "thesis.txt").write_text("mine")
    for words, message in (
        (["--checkpoint", tmp_path / "absent"], "does not exist"),
        (["--checkpoint", empty], "no checkpoint"),
        (["--checkpoint", run, "--data.split", "all"], "train, val, test"),
        (["--checkpoint", run, "--data.split", "tset"], "train, val, test, all"),
        (["--checkpoint", run, "--data.path", empty], "no .npz file"),
        (["--checkpoint", run, "--data.path", folder, "--data.split", "val"], "it has test 10, train 10"),
        (["--checkpoint", run, "--output", notes], "thesis.txt"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            score(*words)
    assert (notes / "thesis.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nan_in_a_picture_is_refused(run, folder):
    volume = np.zeros((4, 16, 16, 16), np.float32)
    volume[2, 3, 4, 5] = np.nan
    np.savez(folder / "cases.npz", volume=volume)
    with pytest.raises(UserError, match="not finite"):
        score("--checkpoint", run, "--data.path", folder, "--data.split", "all")


def test_a_checkpoint_whose_folder_is_gone_asks_for_data_path(copied, folder):
    changed = json.loads((copied / "config.json").read_text())
    changed["data"]["path"] = str(folder / "gone")
    (copied / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="--data.path"):
        scoring_config(Checkpoint(copied), EvalArguments(str(copied)))


def test_a_checkpoint_of_another_version_says_so(copied):
    changed = json.loads((copied / "config.json").read_text())
    changed["train"]["patience"] = 3
    (copied / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="unknown field 'train.patience': the checkpoint was written by r1jax"):
        scoring_config(Checkpoint(copied), EvalArguments(str(copied)))


def test_cuda_without_a_gpu_exits_with_2(run):
    words = [sys.executable, str(ROOT / "eval.py"), "--checkpoint", str(run), "--platform", "cuda"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --platform cuda") and len(done.stderr.splitlines()) == 1
