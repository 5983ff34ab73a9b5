"""Which tokenizer a run reads: the one named, else that of the weights that it goes on or starts from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r1jax.config import Config, DataConfig, DecoderConfig, ModelConfig, TaskConfig, TrainConfig
from r1jax.data.tokenizer_files import byte_files
from r1jax.errors import UserError
from r1jax.train.checkpoints import CheckpointFolder, find_checkpoint, write_sealed
from r1jax.train.start import with_tokenizer

STATE = {"params": {"decoder": {"norm": np.ones(2, np.float32)}}}
CONFIG = Config(model=ModelConfig(modalities=("text",)), task=TaskConfig(name="language"))
FILES = {"tokenizer.json": byte_files()["tokenizer.json"].replace(b"r1jax_end", b"other_end")}
RUN, IMPORT = {"data": {"name": "texts", "fingerprint": "0" * 64}}, {"hugging_face": {}}


def save(path, meta=RUN, config=CONFIG, tokenizer=None):
    """A checkpoint of no more than what is asked of it here."""
    return write_sealed(path, STATE, config, {"step": 0, "validation": None} | meta, tokenizer).path


def named(tmp_path, **change):
    """The tokenizer of a run in a folder of its own."""
    data, train = DataConfig(tokenizer=change.pop("tokenizer", None)), TrainConfig(init=change.pop("init", None))
    asked = replace(CONFIG, workdir=str(tmp_path / "run"), data=data, train=train, **change)
    return with_tokenizer(asked).data.tokenizer


def test_it_is_that_of_the_first_weights(tmp_path):
    assert named(tmp_path) is None
    path = save(tmp_path / "import", IMPORT, tokenizer=FILES)
    assert named(tmp_path, init=str(path)) == str(path / "tokenizer")
    assert (path / "tokenizer" / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert named(tmp_path, init=str(path), task=TaskConfig(name="medical")) is None
    assert named(tmp_path, init=str(save(tmp_path / "bytes"))) is None
    older = replace(CONFIG, data=DataConfig(tokenizer="my_tokenizer"))  # before checkpoints held the files
    assert named(tmp_path, init=str(save(tmp_path / "older", config=older))) == "my_tokenizer"


def test_a_run_goes_on_with_its_own(tmp_path):
    save(tmp_path / "run" / "checkpoints" / "00000002", tokenizer=FILES)
    newest = save(tmp_path / "run" / "checkpoints" / "00000004", tokenizer=FILES)
    assert named(tmp_path, init="nowhere") == str(newest / "tokenizer")
    (newest / "tokenizer" / "tokenizer.json").write_bytes(b"{}")  # such a checkpoint is set aside afterwards
    assert named(tmp_path, init="nowhere") == str(tmp_path / "run" / "checkpoints" / "00000002" / "tokenizer")
    (newest / "tokenizer" / "tokenizer.json").unlink()
    assert named(tmp_path, init="nowhere") == str(tmp_path / "run" / "checkpoints" / "00000002" / "tokenizer")
    assert named(tmp_path, tokenizer="mine") == "mine"


def test_another_tokenizer_is_refused_where_the_embeddings_are_taken(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    given = str(tmp_path)
    same, other = save(tmp_path / "same", tokenizer=FILES), save(tmp_path / "other", tokenizer=byte_files())
    assert named(tmp_path, tokenizer=given, init=str(same)) == given
    for path in (other, save(tmp_path / "bytes")):
        with pytest.raises(UserError, match="data.tokenizer .* is another tokenizer than .*r1jax_end.*: leave it out"):
            named(tmp_path, tokenizer=given, init=str(path))
        model = replace(CONFIG.model, decoder=DecoderConfig(vocab_size=600))
        assert named(tmp_path, tokenizer=given, init=str(path), model=model) == given
    assert named(tmp_path, tokenizer=given, init=str(save(tmp_path / "unknown", IMPORT))) == given


def test_a_damaged_tokenizer_is_never_used(tmp_path):
    path = save(tmp_path / "import", IMPORT, tokenizer=FILES)
    file = path / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match="tokenizer/tokenizer.json is not what was written"):
        named(tmp_path, init=str(path))
    with pytest.raises(UserError, match="tokenizer/tokenizer.json is not what was written"):
        find_checkpoint(path).verify()


def test_a_full_disk_amid_the_tokenizer_leaves_nothing(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"00000003 could not be written \(No space left on device\)"):
        folder.save(3, STATE, CONFIG, {"step": 3, "validation": None}, FILES)
    assert list(folder.path.iterdir()) == []
