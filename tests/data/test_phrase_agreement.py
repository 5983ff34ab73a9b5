"""How far annotators agreed, as the files beside the one that is read tell it."""

from pathlib import Path

import numpy as np
import pytest

from r1jax.data import phrase_agreement
from r1jax.data.phrase_agreement import read_agreed
from r1jax.data.phrase_files import read_phrases
from r1jax.data.records import UNKNOWN
from r1jax.errors import UserError
from tests.data.record_sets import write_agreement


def test_the_strictest_file_that_has_a_sentence_tells(tmp_path):
    folder = write_agreement(tmp_path)
    read = read_agreed(str(folder / "Sentences_50Agree.txt"))
    np.testing.assert_array_equal(read.agreed, np.float32([1, 0.875, 0.875, 0.58, 0.58, 0.58]))
    assert not read.beside.any() and read.text == read_phrases(str(folder / "Sentences_50Agree.txt")).text


def test_what_only_other_files_have_comes_after_in_whatever_spelling(tmp_path):
    folder = write_agreement(tmp_path)
    own = read_phrases(str(folder / "Sentences_AllAgree.txt"))
    read = read_agreed(str(folder / "Sentences_AllAgree.txt"))
    assert own.text == ["Lemmink+ñinen 's profit rose"]
    assert read.text == [*own.text, "Sales fell", "Orders rose", "Sales are flat", "It opened a shop"]
    assert read.beside.tolist() == [False, True, True, True, True] and read.ids == ["1", "50:2", "50:3", "50:4", "50:6"]
    assert read.label.tolist() == [2, 0, 2, 1, 1]
    np.testing.assert_array_equal(read.agreed, np.float32([1, 0.875, 0.875, 0.58, 0.58]))


def test_a_store_has_the_other_files_behind_the_same_options(tmp_path, monkeypatch):
    folder, bucket, options = write_agreement(tmp_path), "s3://bucket/fpb", "?region=eu-west-1"
    on_disk = read_agreed(str(folder / "Sentences_75Agree.txt")).digest()

    def local(url):
        assert url.startswith(bucket) and url.endswith(options)
        return url.removesuffix(options).replace(bucket, str(folder))

    monkeypatch.setattr(phrase_agreement, "is_file", lambda url: Path(local(url)).is_file())
    monkeypatch.setattr(phrase_agreement, "read_phrases", lambda url: read_phrases(local(url)))
    read = read_agreed(f"{bucket}/Sentences_75Agree.txt{options}")
    assert read.digest() == on_disk and read.beside.sum() == 2


def test_a_share_is_of_the_label_that_is_learned(tmp_path):
    (tmp_path / "Sentences_50Agree.txt").write_text("Sales rose@positive\nOrders fell@negative\nNothing new@\n")
    (tmp_path / "Sentences_AllAgree.txt").write_text("Sales rose@neutral\nOrders fell@\nNothing new@neutral\n")
    read = read_agreed(str(tmp_path / "Sentences_50Agree.txt"))
    assert read.label.tolist() == [2, 0, UNKNOWN]
    np.testing.assert_array_equal(read.agreed, np.float32([0.58, 0.58, 0.58]))


def test_a_file_without_others_or_of_another_name_is_read_alone(tmp_path):
    folder = write_agreement(tmp_path)
    other = folder / "news.txt"
    other.write_bytes((folder / "Sentences_50Agree.txt").read_bytes())
    alone = tmp_path / "alone" / "Sentences_50Agree.txt"
    alone.parent.mkdir()
    alone.write_bytes(other.read_bytes())
    for path in (other, alone):
        read = read_agreed(str(path))
        assert read.agreed is None and read.beside is None and read.digest() == read_phrases(str(path)).digest()


def test_texts_of_other_scripts_are_told_apart_by_all_their_letters(tmp_path):
    (tmp_path / "Sentences_AllAgree.txt").write_text("利润 2010 上升@positive\n利润 2010 下降@negative\n", "utf-8")
    (tmp_path / "Sentences_50Agree.txt").write_text("利润 2010 持平@neutral\n利润 2010 上升@positive\n", "utf-8")
    read = read_agreed(str(tmp_path / "Sentences_AllAgree.txt"))
    assert read.beside.tolist() == [False, False, True] and read.text[2] == "利润 2010 持平"


def test_digests_differ_by_agreement(tmp_path):
    path = write_agreement(tmp_path) / "Sentences_50Agree.txt"
    before = read_agreed(str(path)).digest()
    (path.parent / "Sentences_75Agree.txt").unlink()
    assert len({before, read_agreed(str(path)).digest(), read_phrases(str(path)).digest()}) == 3


def test_a_wrong_line_of_another_file_is_refused(tmp_path):
    folder = write_agreement(tmp_path)
    (folder / "Sentences_66Agree.txt").write_text("sales@up\n")
    with pytest.raises(UserError, match="Sentences_66Agree.txt: line 1 is 'sales@up'"):
        read_agreed(str(folder / "Sentences_50Agree.txt"))
