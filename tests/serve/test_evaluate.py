import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config import Config, DataConfig, ModelConfig
from r1jax.data.folder import FolderCases
from r1jax.data.synthetic import SyntheticCases
from r1jax.serve.case_reports import LONGEST_NAME, file_name
from r1jax.serve.progress import progress
from r1jax.serve.scored import Scored, seen_in_training
from r1jax.tasks.medical.modes import best_attainable, shown_modes
from r1jax.tasks.medical.task import Medical


@pytest.fixture
def folder(tmp_path):
    """Ten images, six of them for training."""
    marks = np.array(["train"] * 6 + ["val"] * 4)
    images = np.zeros((10, 8, 8), np.uint8)
    np.savez(tmp_path / "cases.npz", image=images, nodule_present=np.arange(10) % 2, split=marks)
    return tmp_path


def test_seen_cases_are_counted(folder):
    task = Medical(Config(model=ModelConfig(modalities=("image",)), data=DataConfig(path=str(folder))))
    for split, seen in (("train", 6), ("val", 0), ("all", 6)):
        source = FolderCases.open(folder, split)
        assert seen_in_training(source, task, {source.fingerprint}) == seen
    assert seen_in_training(source, task, {"0" * 64}) == 0
    synthetic = SyntheticCases(0, 4, "test")
    assert seen_in_training(synthetic, task, synthetic.fingerprint) == 4


def test_an_unmarked_folder_is_known_to_hold_training_cases(tmp_path, capsys):
    np.savez(tmp_path / "cases.npz", image=np.zeros((10, 8, 8), np.uint8))
    task = Medical(Config(model=ModelConfig(modalities=("image",)), data=DataConfig(path=str(tmp_path))))
    source = task.source("test")
    assert len(source) == 10
    assert seen_in_training(source, task, {source.fingerprint}) == 8


def scored_of(source, reads, modes) -> Scored:
    return Scored(source, reads, ["a"], {}, {mode: {} for mode in modes}, {mode: {} for mode in modes}, {})


def test_a_case_is_called_by_what_it_has():
    scored = scored_of(SyntheticCases(0, 1, "test"), ("volume", "table", "text"), ("both", "image_only", "record_only"))
    raw = {
        "volume": np.zeros((4, 2, 2, 2), np.uint8),
        "has_volume": np.array([True, True, False, True]),
        "table": np.array([[1.0], [np.nan], [1.0], [np.nan]]),
        "text": ["", "words", "words", ""],
    }
    missing = [scored.missing(raw, row) for row in range(4)]
    assert missing == [("text",), ("table",), ("volume",), ("table", "text")]
    assert [scored.mode_of(names) for names in missing] == ["both", "both", "record_only", "image_only"]
    assert scored_of(scored.source, ("image",), ("image_only",)).missing(raw, 0) == ("image",)


def test_modes_have_the_names_of_what_is_shown():
    every = ("volume", "image", "table", "text")
    assert shown_modes(every, every) == {"both": "both", "image_only": "image_only", "record_only": "record_only"}
    assert shown_modes(("image",), every) == {"both": "image_only"}
    assert shown_modes(every, ("volume",)) == {"both": "image_only"}
    assert shown_modes(every, ("text",)) == {"both": "record_only"}


def test_the_best_attainable_is_that_of_the_mode(folder):
    source = SyntheticCases(0, 64, "test")
    ceilings = source.ceilings()
    assert best_attainable(source) == {
        "both": {"malignancy": ceilings["both"]},
        "image_only": {"malignancy": ceilings["image"]},
        "record_only": {"malignancy": ceilings["record"]},
    }
    assert best_attainable(FolderCases.open(folder)) == {}


@pytest.mark.parametrize("name", ["synthetic-test-000001", "患者 7", "scan_1.2.840"])
def test_plain_names_are_kept(name):
    assert file_name(name) == name


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.text(string.printable, min_size=1)


@given(st.lists(NAMES, unique=True, min_size=2, max_size=2))
def test_files_are_safe_and_differ_where_cases_differ(names):
    files = [file_name(name) for name in names]
    assert files[0] != files[1]
    for file in files:
        assert not set(file) & set('/\\\0\n\t*?"<>|:') and not file.startswith((".", "-"))
        assert 0 < len(file.encode()) <= LONGEST_NAME


def test_progress_ends_with_a_plain_line(capsys):
    with progress("cases", 3) as steps:
        steps.advance(2)
        steps.advance(2)
    assert capsys.readouterr().err.startswith("cases 3/3")
