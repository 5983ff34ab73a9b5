"""Strict reading: what is damaged is refused by name, and whatever a random change does, nothing is loaded wrong."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from r1jax.errors import UserError
from r1jax.hf.files import open_folder, read_header
from r1jax.hf.load import load_params, read_config
from tests.hf.checkpoints import params_by_name, stored, write_folder

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)
SOUND = save({"a": A, "b": B})


def split(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(**entries):
    header, data = split(SOUND)
    for name, change in entries.items():
        header[name] |= change
    return joined(header, data)


def test_sound_files_are_read(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(SOUND)
    tensors = read_header(file)
    np.testing.assert_array_equal(tensors["a"].read_rows(0, 2), A, strict=True)
    np.testing.assert_array_equal(tensors["a"].read_rows(1, 2), A[1:], strict=True)
    np.testing.assert_array_equal(tensors["b"].read_rows(1, 3), B[1:3], strict=True)


HEADER, DATA = split(SOUND)
BROKEN = {
    "empty": (b"", "is no safetensors file or is cut off"),
    "seven bytes": (SOUND[:7], "is no safetensors file or is cut off"),
    "header beyond the file": (SOUND[:20], "is no safetensors file or is cut off"),
    "huge header": (joined(HEADER, DATA, 2**63), "header of 9223372036854775808 bytes"),
    "no JSON": (joined(b"{]", DATA), "its header is damaged"),
    "deep JSON": (joined(b"[" * 100_000, DATA), "its header is damaged"),
    "no UTF-8": (joined(b'{"\xff": 1}', DATA), "its header is damaged"),
    "a list": (joined(b"[]", DATA), "must be a JSON object"),
    "name twice": (joined(b'{"a": {}, "a": {}}', DATA), "'a' is there twice"),
    "long number": (joined(b'{"a": ' + b"9" * 5000 + b"}", DATA), "its header is damaged"),
    "no tensor": (joined(HEADER | {"a": 3}, DATA), "the tensor 'a' is described as 3"),
    "no shape": (joined(HEADER | {"a": {"dtype": "F32", "data_offsets": [0, 24]}}, DATA), "the tensor 'a'"),
    "unknown dtype": (changed(a={"dtype": "F33"}), "the tensor 'a' has the dtype 'F33'"),
    "dtype is a list": (changed(a={"dtype": []}), "the tensor 'a' has the dtype []"),
    "negative shape": (changed(a={"shape": [-2, -3]}), "the tensor 'a' has the shape [-2, -3]"),
    "shape of floats": (changed(a={"shape": [2.0, 3]}), "the tensor 'a' has the shape"),
    "shape of truths": (changed(a={"shape": [True, 6]}), "the tensor 'a' has the shape"),
    "three offsets": (changed(a={"data_offsets": [0, 24, 24]}), "the tensor 'a' has the data_offsets"),
    "wrong dtype": (changed(a={"dtype": "F16"}), "the tensor 'a' has 24 bytes, but shape [2, 3] of F16 needs 12"),
    "wrong shape": (changed(a={"shape": [2, 4]}), "the tensor 'a' has 24 bytes, but shape [2, 4] of F32 needs 32"),
    "backwards": (changed(a={"data_offsets": [24, 0]}), "the tensor 'a' has -24 bytes"),
    "overlap": (changed(b={"data_offsets": [16, 24]}), "overlaps the tensor before it"),
    "gap": (joined(HEADER | {"b": HEADER["b"] | {"data_offsets": [28, 36]}}, DATA + bytes(4)), "'b' leaves a gap"),
    "cut off": (SOUND[:-1], "is cut off"),
    "too long": (SOUND + b"x", "has 1 bytes after its last tensor"),
}


@pytest.mark.parametrize(("content", "told"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, content, told):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_header(file)
    assert str(file) in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_no_crash(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(SOUND)
    tensors = read_header(file)
    file.write_bytes(SOUND[:-30])
    with pytest.raises(UserError, match="ends amid the tensor 'a'"):
        tensors["a"].read_rows(0, 2)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read at the tensor 'a': No such file"):
        tensors["a"].read_rows(0, 2)


@pytest.fixture
def sharded(tmp_path):
    return write_folder(tmp_path, {}, {"a": A, "b": B, "c": A}, shards=2)  # a and c in the first


def rewrite_map(folder, change):
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    change(where["weight_map"])
    index.write_text(json.dumps(where))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_are_found(sharded):
    assert {name: tensor.file.name for name, tensor in open_folder(sharded).items()} == {
        "a": FIRST,
        "b": SECOND,
        "c": FIRST,
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda where: where.update(d=FIRST), f"{FIRST} lacks the tensor 'd'"),
        (lambda where: where.pop("c"), f"{FIRST} holds the tensor 'c', but model.safetensors.index.json does not name"),
        (lambda where: where.update(c=SECOND), f"the tensor 'c', but model.safetensors.index.json puts it in {SECOND}"),
        (lambda where: where.update(d="other.safetensors"), "other.safetensors is missing"),
        (lambda where: where.update(a="../x.safetensors"), "the file of 'a' is '../x.safetensors'"),
        (lambda where: where.update(a=3), "the file of 'a' is 3"),
        (lambda where: where.clear(), "weight_map is {}"),
    ],
)
def test_index_and_shards_must_agree(sharded, change, told):
    rewrite_map(sharded, change)
    with pytest.raises(UserError) as caught:
        open_folder(sharded)
    assert told in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(sharded):
    (sharded / SECOND).write_bytes(save({"a": A, "b": B}))
    with pytest.raises(UserError, match=f"'a' is both in {FIRST} and in {SECOND}"):
        open_folder(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / FIRST).unlink()
    with pytest.raises(UserError, match=rf"{FIRST} is missing, although .* puts 2 tensors there, 'a' for one"):
        open_folder(sharded)


def test_a_folder_without_weights_or_with_two_kinds(sharded, tmp_path):
    (sharded / "model.safetensors").write_bytes(SOUND)
    with pytest.raises(UserError, match="holds both"):
        open_folder(sharded)
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        open_folder(tmp_path / "nothing")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A sound sharded checkpoint, and its parameters."""
    published, tensors, _ = stored("v2")
    folder = write_folder(tmp_path_factory.mktemp("small"), published, tensors, shards=2)
    config = read_config(folder)
    return folder, config, params_by_name(load_params(folder, config), config)


NUMBERS = st.integers(0, 2**64 - 1)


@settings(max_examples=220)
@given(st.data())
def test_no_random_change_crashes_or_loads_wrong(small, data):
    """Changes to headers, lengths and the index are refused or harmless; numbers that were read are those written."""
    folder, config, expected = small
    files = sorted(p for p in folder.iterdir() if p.name != "config.json")
    file = files[data.draw(st.integers(0, len(files) - 1), "file")]
    sound = file.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little") if file.suffix == ".safetensors" else len(sound)
    kind = data.draw(st.sampled_from(["bytes", "length", "cut", "longer", "number", "swap"]), "kind")
    content = bytearray(sound)
    if kind == "bytes":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    elif kind == "length":
        content[:8] = data.draw(NUMBERS).to_bytes(8, "little")
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "longer":
        content += data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "number":  # one digit of the header becomes another
        digits = [i for i in range(8, header) if chr(sound[i]).isdigit()]
        content[digits[data.draw(st.integers(0, len(digits) - 1))]] = ord(str(data.draw(st.integers(0, 9))))
    else:
        i, j = (data.draw(st.integers(8, header - 1)) for _ in range(2))
        content[i], content[j] = content[j], content[i]
    try:
        file.write_bytes(content)
        params = params_by_name(load_params(folder, config), config)
    except UserError as error:
        assert str(folder) in str(error)
    else:
        assert params.keys() == expected.keys()
        for name, value in params.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name, strict=True)
    finally:
        file.write_bytes(sound)
