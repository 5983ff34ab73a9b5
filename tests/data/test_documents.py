import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.documents import LONGEST, part_of, pieces, read_documents
from r1jax.errors import UserError


def test_text_and_jsonl_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_text("zwei\n二\n", "utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "eins"}) + "\n\n" + json.dumps({"text": " ", "x": 1}) + "\n")
    (tmp_path / "notes.md").write_text("not read")
    assert read_documents(str(tmp_path), "all") == ["eins", "zwei\n二\n"]
    assert read_documents(str(tmp_path / "b.txt"), "all") == ["zwei\n二\n"]


def test_files_named_after_their_part(tmp_path):
    for name in ("train-0.txt", "train-1.txt", "val.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("l") else name)
    assert read_documents(str(tmp_path), "train") == ["train-0.txt", "train-1.txt"]
    assert read_documents(str(tmp_path), "val") == ["val.jsonl"]
    assert len(read_documents(str(tmp_path), "all")) == 3
    with pytest.raises(UserError, match="no text in its part 'test': add a file named test"):
        read_documents(str(tmp_path), "test")
    (tmp_path / "more.txt").write_text("x")
    with pytest.raises(UserError, match="more.txt: some files of .* are named after a part"):
        read_documents(str(tmp_path), "train")


def test_documents_are_split_by_their_content(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    parts = {part: read_documents(str(file), part) for part in ("train", "val", "test")}
    assert sorted(sum(parts.values(), [])) == sorted(texts) == sorted(read_documents(str(file), "all"))
    assert 30 <= len(parts["val"]) <= 70 and 30 <= len(parts["test"]) <= 70
    assert all(part_of(text) == part for part, found in parts.items() for text in found)


def test_one_book_is_cut_and_can_be_split(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i} of a long book\n" for i in range(60000)))
    parts = [read_documents(str(tmp_path / "book.txt"), part) for part in ("train", "val", "test")]
    assert all(parts) and all(len(text) <= LONGEST for part in parts for text in part)


@given(st.text(alphabet="ab\n", max_size=50).map(lambda text: text * 2000))
def test_pieces_lose_nothing(text):
    found = list(pieces(text))
    assert "".join(found) == text and all(0 < len(piece) <= LONGEST for piece in found)
    assert all(piece.endswith("\n") for piece in found[:-1] if "\n" in piece)


BAD = {
    "absent": (None, "does not exist"),
    "a.csv": (b"x", "no .txt or .jsonl file"),
    "a.txt": (b"\xff\xfe", "cannot be read as UTF-8"),
    "b.txt": (b" \n", "has no text in its part 'all'"),
    "a.jsonl": (b'{"text": "x"}\n{"text"', "a.jsonl, line 2: no JSON"),
    "b.jsonl": (b'{"txt": "x"}', 'b.jsonl, line 1: no object with a "text"'),
    "c.jsonl": (b'["x"]', 'c.jsonl, line 1: no object with a "text"'),
    "d.jsonl": (b'{"text": "\\ud800"}', "d.jsonl, line 1: the text holds half a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, told = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_documents(str(tmp_path / name), "all")
    assert "\n" not in str(caught.value)


def test_too_few_documents_to_hold_one_out(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    part = next(part for part in ("val", "test") if part != part_of("one"))
    with pytest.raises(UserError, match=f"no text in its part '{part}': name files train"):
        read_documents(str(tmp_path / "a.txt"), part)
