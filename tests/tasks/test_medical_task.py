"""What the task asks of a folder before anything is trained on it."""

import numpy as np
import pytest

import train
from r1jax.config import Config, DataConfig, ModelConfig, TaskConfig
from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.tasks.medical.task import Medical


def task_of(folder, *fields):
    config = Config(
        model=ModelConfig(modalities=("image",)), task=TaskConfig(fields=fields), data=DataConfig(path=str(folder))
    )
    return Medical(config)


@pytest.fixture
def folder(tmp_path):
    """Ten images; the answer `texture` is known in training, `margin` in validation alone."""
    margin = np.where(np.arange(10) < 6, np.nan, 2.0)
    marks = np.array(["train"] * 6 + ["val"] * 4)
    images = np.zeros((10, 8, 8), np.uint8)
    np.savez(tmp_path / "cases.npz", image=images, texture=np.full(10, 3), margin=margin, split=marks)
    return tmp_path


def test_findings_without_a_known_answer_are_named(folder):
    task = task_of(folder, "texture", "margin", "malignancy", "center_mm")
    assert task.remarks(task.source("train")) == [
        "note: no training case knows margin, malignancy, center_mm: not learned"
    ]
    assert task.remarks(task.source("val")) == ["note: no training case knows malignancy, center_mm: not learned"]
    assert task.remarks(SyntheticCases(0, 4, "train")) == []


def test_nothing_to_learn_is_refused_with_what_there_is(folder):
    task = task_of(folder, "margin", "malignancy")
    message = r"no training case with a known margin or malignancy: choose .* \(texture\) with --task.fields, or add"
    with pytest.raises(UserError, match=message):
        task.remarks(task.source("train"))


def test_the_command_refuses_before_it_writes(folder, tmp_path):
    words = ["--config", "configs/medical.py:luna16_fpr_2d", "--data.path", str(folder), "--train.batch_size", "8"]
    with pytest.raises(UserError, match="known nodule_present: choose from what is known there"):
        train.main([*words, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
