"""The device reads an .npz file as r1jax does, and refuses what it cannot read."""

import json

import numpy as np
import pytest

from r1jax.data.folder import FolderCases
from r1jax.data.synthetic import SyntheticCases
from r1jax.edge import __main__ as command
from r1jax.edge.artefact import FORMAT, RUNNER, SUM, TEXTS, Artefact, InputError, card_sum
from r1jax.edge.cases import case_inputs, missing_of, points_of, read_cases
from r1jax.serve.export_card import write_card
from r1jax.serve.export_graph import Port
from r1jax.serve.export_medical import ports, raw_inputs
from r1jax.serve.export_texts import report_texts
from r1jax.tasks.medical.task import Medical
from tests.serve.exported import write_cases
from tests.train.tiny import get_config

WORDS = report_texts()


def card_of(wanted: dict[str, Port]) -> dict:
    inputs = {name: port._asdict() | {"shape": list(port.shape)} for name, port in wanted.items()}
    return {"task": "medical", "inputs": inputs, "modalities": ["volume", "table", "text"], "operating_points": {}}


@pytest.fixture(scope="module")
def wanted() -> dict[str, Port]:
    return ports(Medical(get_config()), {"volume": (16, 16, 16)})


@pytest.fixture(scope="module")
def raw() -> dict:
    return SyntheticCases(0, 5, "test", (16, 16, 16)).read_batch(np.arange(5))


@pytest.mark.parametrize("kind", ["int16", "uint8", "grey", "float HU"])
def test_cases_are_read_as_the_evaluation_reads_them(tmp_path, wanted, raw, kind):
    hu = raw["volume"].clip(-1000, 400)
    grey = (hu + 1000.0) / 1400
    volume = {"int16": hu, "uint8": (255 * grey).astype(np.uint8), "grey": grey, "float HU": hu + 0.3}[kind]
    write_cases(tmp_path / "cases.npz", raw | {"volume": volume})
    expected = raw_inputs(FolderCases.open(tmp_path).read_batch(np.arange(5)), wanted)
    card = card_of(wanted)
    ids, arrays, texts = read_cases(tmp_path / "cases.npz", card, WORDS)
    assert ids == raw["case_id"]
    found = [case_inputs(card, arrays, texts, row) for row in range(5)]
    for name, values in expected.items():
        assert found[0][name].dtype == values.dtype and found[0].keys() == expected.keys()
        np.testing.assert_allclose([one[name] for one in found], values, rtol=1e-6)
    missing = [missing_of(card, one) for one in found]
    assert missing == [[], ["volume"], ["table"], ["text"], []]


def test_what_a_file_lacks_is_missing(tmp_path, wanted):
    np.savez(tmp_path / "cases.npz", age=[61.0, np.nan], text=["", "cough"])
    ids, arrays, texts = read_cases(tmp_path / "cases.npz", card_of(wanted), WORDS)
    assert ids == ["000000", "000001"]
    missing = [missing_of(card_of(wanted), case_inputs(card_of(wanted), arrays, texts, row)) for row in (0, 1)]
    assert missing == [["volume", "text"], ["volume", "table"]]


def test_operating_points_are_those_of_what_a_case_has(wanted):
    thresholds = {"both": 0.1, "image_only": 0.2, "record_only": 0.3}
    points = {mode: {"malignancy": {"threshold": value}} for mode, value in thresholds.items()}
    card = card_of(wanted) | {"operating_points": points}
    for missing, mode in (
        ((), "both"),
        (("text",), "both"),
        (("volume",), "record_only"),
        (("table", "text"), "image_only"),
    ):
        assert points_of(card, missing) == points[mode]
    alone = {"modalities": ["image"], "operating_points": {"image_only": points["image_only"]}}
    assert points_of(alone, []) == points["image_only"]


VOLUME = np.zeros((1, 16, 16, 16), np.int16)
BAD = {
    "size": ({"volume": np.zeros((1, 8, 8, 8), np.int16)}, r"size \[8, 8, 8\]: the artefact reads \[16, 16, 16\]"),
    "unit": ({"volume": np.linspace(-3, 3, 16**3).reshape(1, 16, 16, 16)}, "neither 0..1 nor Hounsfield"),
    "nan": ({"volume": np.full((1, 16, 16, 16), np.nan)}, "neither 0..1 nor Hounsfield"),
    "type": ({"volume": np.zeros((1, 16, 16, 16), np.int32)}, "is int32"),
    "spacing": ({"volume": np.zeros((1, 16, 16, 16), np.int16), "spacing": [1.0, 1.0, 0.0]}, "no list of 3 sizes"),
    "range": ({"age": [300.0]}, r"'age' .* is 300.0 in row 0: it takes 0 to 120"),
    "rows": ({"age": [30.0], "text": ["a", "b"]}, "not 2 cases"),
    "nothing": ({"other": [1.0]}, "has no cases"),
    "string field": ({"age": ["old"]}, "'age' .* is <U3 .*one number per case"),
    "2-D field": ({"age": [[30.0]]}, r"'age' .* shape \[1, 1\]: give one number per case"),
    "2-D text": ({"text": [["a"]]}, r"'text' .* shape \[1, 1\]: give one string per case"),
    "float text": ({"text": [1.5]}, "'text' .* is float64 .*one string per case"),
    "string spacing": ({"volume": VOLUME, "spacing": ["1", "1", "1"]}, "no list of 3 sizes"),
    "3-D spacing": ({"volume": VOLUME, "spacing": np.ones((1, 3, 3))}, "no list of 3 sizes"),
    "wide spacing": ({"volume": VOLUME, "spacing": np.ones(5)}, "no list of 3 sizes"),
    "spacing rows": ({"volume": VOLUME, "spacing": np.ones((2, 3))}, "has 2 rows, not 1 or 1"),
    "string flag": ({"volume": VOLUME, "has_volume": ["yes"]}, "'has_volume' .*one number per case"),
    "flag": ({"volume": VOLUME, "has_volume": [2]}, "other numbers than 0 and 1"),
    "id bytes": ({"age": [30.0], "case_id": np.array([b"\xff"])}, "'case_id' .* is not UTF-8 in row 0"),
    "surrogate": ({"text": np.array(["\ud800"])}, "'text' .* is not UTF-8 in row 0"),
    "same id": ({"age": [30.0, 31.0, 32.0], "case_id": ["a", "b", "a "]}, "has 'a' 2 times"),
    "slash": ({"age": [30.0], "case_id": ["a/b"]}, "is 'a/b' in row 0: .* without slashes"),
    "no name": ({"age": [30.0], "case_id": [" "]}, "is '' in row 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cases_are_refused_in_one_sentence(tmp_path, wanted, name):
    arrays, message = BAD[name]
    np.savez(tmp_path / "cases.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        read_cases(tmp_path / "cases.npz", card_of(wanted), WORDS)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path, wanted):
    (tmp_path / "cases.npz").write_text("cases")
    with pytest.raises(InputError, match="cannot be read as .npz"):
        read_cases(tmp_path / "cases.npz", card_of(wanted), WORDS)


CARD = {"format": FORMAT, "file": "model.tflite", "sha256": dict.fromkeys(["model.tflite", TEXTS, RUNNER], "0" * 64)}


@pytest.mark.parametrize("damage", ["altered", "missing", "card", "version"])
def test_a_damaged_artefact_is_not_run(tmp_path, damage):
    card = CARD | {"format": "r1jax export 2"} if damage == "version" else CARD
    (tmp_path / "card.json").write_text("{" if damage == "card" else json.dumps(card | {SUM: card_sum(card)}))
    if damage == "altered":
        (tmp_path / "model.tflite").write_bytes(b"model")
    message = {"card": "cannot be read", "version": "is no card of"}.get(damage, "missing or not what was exported")
    with pytest.raises(InputError, match=message):
        Artefact(tmp_path)


def test_an_altered_card_is_not_believed(tmp_path):
    points = {"both": {"malignancy": {"threshold": 0.5}}}
    write_card(tmp_path, CARD | {"operating_points": points})
    with pytest.raises(InputError, match=r"model\.tflite is missing or not what was exported"):
        Artefact(tmp_path)  # the card itself is believed
    file = tmp_path / "card.json"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(InputError, match=r"card\.json is not what was exported"):
        Artefact(tmp_path)


@pytest.mark.parametrize("sums", [{}, {"model.tflite": "0"}, ["model.tflite"], None])
def test_a_card_that_vouches_for_less_than_all_files_is_refused(tmp_path, sums):
    write_card(tmp_path, CARD | {"sha256": sums})
    with pytest.raises(InputError, match="has no sum of some file"):
        Artefact(tmp_path)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(tmp_path / "r1jax_edge.pyz"), str(tmp_path / "cases.npz")])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'card.json'} cannot be read") and told.count("\n") == 1


@pytest.fixture
def device(tmp_path, monkeypatch, wanted):
    """The command with a model that finds a long axis of 3 mm in every case."""
    card = card_of(wanted) | {"checkpoint": {"sha256": "a" * 64}, "model": "m", "versions": {"r1jax": "1"}}
    found = {"long_axis_mm": np.asarray(3.0)}
    model = Artefact.__new__(Artefact)  # without files and without an interpreter
    model.card, model.texts, model.predict = card, WORDS, lambda inputs: found
    monkeypatch.setattr(command, "Artefact", lambda *_: model)
    np.savez(tmp_path / "cases.npz", age=[61.0, 62.0], case_id=["a", "b"])

    def call(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["r1jax_edge.pyz", str(tmp_path / "cases.npz"), *words])
        command.main()

    return call


def test_every_case_has_its_report(tmp_path, device, capsys):
    device("--output", str(tmp_path / "reports"))
    assert sorted(file.name for file in (tmp_path / "reports").iterdir()) == ["a.json", "a.xml", "b.json", "b.xml"]
    assert capsys.readouterr().out == "2 reports, JSON and XML\n"


def test_a_case_that_has_nothing_leaves_no_report_of_another(tmp_path, device, capsys):
    np.savez(tmp_path / "cases.npz", age=[61.0, np.nan], case_id=["a", "b"])
    with pytest.raises(SystemExit, match="2"):
        device("--output", str(tmp_path / "reports"))
    assert "case 'b' has none of volume, table, text" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


def test_an_artefact_of_a_task_without_reports_is_refused(device, monkeypatch, capsys):
    monkeypatch.setattr(command, "REPORTS", {})
    with pytest.raises(SystemExit, match="2"):
        device()
    assert "of the medical task, which this program has no reports of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "cases.npz"), "cases.npz: File exists"),
        (("--output", "cases.npz/reports"), "cases.npz/reports: Not a directory"),
        (("--threads", "-1"), "--threads -1: give 1 or more"),
    ],
)
def test_what_cannot_be_written_or_run_is_one_line(tmp_path, device, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        device(*words)
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}") and told.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["cases.npz"]
