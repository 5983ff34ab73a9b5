"""Which decoder, tokenizer and stop tokens a folder stands for."""

import json

import pytest
import tokenizers

from r1jax.config import Config, ModelConfig
from r1jax.data.text import Tokenizer
from r1jax.data.tokenizer import EOS
from r1jax.errors import UserError
from r1jax.hf.load import load_params, read_config
from r1jax.serve.pretrained import Pretrained, open_pretrained
from r1jax.train.checkpoints import CheckpointFolder
from tests.hf.checkpoints import stored, write_folder

LIBRARY = tokenizers.Tokenizer(tokenizers.models.BPE())
RUN = {"step": 5, "validation": None, "data": {"name": "texts", "fingerprint": "0" * 64}}


@pytest.fixture
def folder(tmp_path):
    published, tensors, _ = stored("v2")
    return write_folder(tmp_path / "published", published, tensors)


def save_run(path, folder, meta=RUN, without=(), **data):
    """A run of the same weights."""
    decoder = read_config(folder)
    config = Config(model=ModelConfig(decoder=decoder))
    params = load_params(folder, decoder)
    state = {"params": {"decoder": {name: x for name, x in params.items() if name not in without}}}
    CheckpointFolder(path / "checkpoints").save(5, state, config, meta, **data)
    return path


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ({}, (3,)),
        ({"config": {"eos_token_id": 1}}, (1,)),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [4, 7]}}, (4, 7)),
        ({"config": {"eos_token_id": 1}, "generation_config": {}}, (1,)),
    ],
)
def test_stop_tokens(folder, published, expected):
    source = Pretrained(folder, read_config(folder), folder, published, None)
    assert source.stop_tokens(Tokenizer(LIBRARY, None, 3)) == expected
    assert source.stop_tokens(Tokenizer(None, 1, EOS)) == (EOS,)


def test_stop_tokens_that_are_none(folder):
    source = Pretrained(folder, read_config(folder), folder, {"config": {"eos_token_id": "</s>"}}, None)
    with pytest.raises(UserError, match="eos_token_id of config.json is '</s>'"):
        source.stop_tokens(Tokenizer(LIBRARY, None, None))


def test_either_kind_is_recognised(folder, tmp_path):
    assert open_pretrained(folder).checkpoint is None
    run = save_run(tmp_path / "run", folder)
    for path in (run, run / "checkpoints", run / "checkpoints" / "00000005"):
        source = open_pretrained(path)
        assert source.checkpoint.step == 5 and source.decoder == read_config(folder) and source.files is None
    with pytest.raises(UserError, match="nowhere/config.json does not exist"):
        open_pretrained(tmp_path / "nowhere")


def test_special_tokens_of_another_vocabulary_are_forgotten(folder, tmp_path):
    for size, kept in ((read_config(folder).vocab_size, True), (7, False)):
        meta = RUN | {"hugging_face": {"config": {"vocab_size": size, "eos_token_id": 1}}}
        run = save_run(tmp_path / str(size) / "run", folder, meta)
        assert bool(open_pretrained(run).published) == kept


def test_a_tokenizer_that_is_gone_is_not_taken_for_bytes(folder, tmp_path):
    run = save_run(tmp_path / "run", folder)
    config = run / "checkpoints" / "00000005" / "config.json"
    values = json.loads(config.read_text())
    values["data"]["tokenizer"] = str(tmp_path / "gone")
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match="gone, which is not there any more"):
        open_pretrained(run).tokenizer()


def test_a_tokenizer_with_more_tokens_than_the_model(folder):
    words = {f"word{i}": i for i in range(41)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="has 41 tokens, but vocab_size is 40"):
        open_pretrained(folder).tokenizer()


def test_a_model_without_a_language_head_is_refused(folder, tmp_path):
    run = save_run(tmp_path / "run", folder, without=("lm_head",))
    with pytest.raises(UserError, match=r"has no language head \(it is of the medical task\): give one of a language"):
        open_pretrained(run).load("cpu")
