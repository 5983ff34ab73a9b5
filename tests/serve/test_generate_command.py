"""`r1jax generate` from a folder to text."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from r1jax.__main__ import dispatch
from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig, MeshConfig
from r1jax.data.chat import BEGIN, END, Message
from r1jax.data.text import Tokenizer, load_tokenizer
from r1jax.data.tokenizer import EOS, encode
from r1jax.errors import UserError
from r1jax.hf.load import load_params, read_config
from r1jax.hf.save import save_params
from r1jax.models.decoder import Decoder
from r1jax.models.served import Served
from r1jax.parallel.mesh import make_mesh
from r1jax.serve import generate_command, pretrained
from r1jax.serve.generate import Generator
from r1jax.serve.pretrained import Pretrained

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DecoderConfig(
    vocab_size=264,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=8,
    intermediate_size=24,
    moe_intermediate_size=8,
)
FEW = ["--max_new_tokens", "6", "--page_size", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint without a tokenizer."""

    def everything(decoder, tokens):
        x, positions, valid = decoder.embed(tokens), jnp.zeros(tokens.shape, jnp.int32), jnp.ones(tokens.shape, bool)
        hidden, _ = decoder(x, positions, valid)
        return decoder.predict_second(hidden, tokens, positions, valid), decoder.logits(hidden)

    tokens = jnp.zeros((1, 3), jnp.int32)
    init = jax.eval_shape(lambda: Decoder(CONFIG).init(jax.random.key(0), tokens, method=everything)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(leaf.ndim == 1, 0.3, leaf.shape).astype(np.float32), init)
    path = tmp_path_factory.mktemp("random") / "model"
    save_params(path, CONFIG, params, dtype="float32")
    return path


def answer_of(folder, prompt, **settings):
    config = read_config(folder)
    settings = GenerationSettings(max_new_tokens=6, page_size=8, **settings)
    result = Generator(config, load_params(folder, config)).generate([prompt], settings)
    return result.tokens[0, : result.lengths[0]].tolist()


def test_text_is_that_of_the_generator(folder, capsys):
    assert dispatch(["generate", str(folder), "--prompt", "a 肺", *FEW]) == 0
    shown = capsys.readouterr()
    expected = answer_of(folder, encode("a 肺")[:-1], stop_tokens=(EOS,))
    assert shown.out == Tokenizer(None, None).decode(expected) + "\n"
    assert f"7 tokens read, {len(expected)} given" not in shown.err  # 1 + 1 + 1 + 3 bytes
    assert f"6 tokens read, {len(expected)} given" in shown.err


def test_speculation_gives_the_same_text_and_says_how_often_it_was_right(folder, capsys):
    words = ["generate", str(folder), "--prompt", "abc", *FEW]
    assert dispatch(words) == 0
    plain = capsys.readouterr()
    assert dispatch([*words, "--speculate"]) == 0
    faster = capsys.readouterr()
    assert faster.out == plain.out
    assert "% of MTP's guesses were right" in faster.err and "guesses" not in plain.err


def test_weights_that_are_fused_are_in_memory_once(folder, monkeypatch):
    """The tree that was loaded is gone before the first token."""
    one, load, loaded, found = make_mesh(MeshConfig(), jax.devices()[:1]), Pretrained.load, [], []

    def noted(*arguments):
        params = load(*arguments)
        loaded.append(weakref.ref(params["layers_0"]["self_attn"]["q_proj"]["weight"]))
        return params

    def answer(generator, *_):
        found.append((isinstance(generator.held, Served), loaded[0]()))

    monkeypatch.setattr(pretrained, "make_mesh", lambda config: one)
    monkeypatch.setattr(Pretrained, "load", noted)
    monkeypatch.setattr(generate_command, "_answer", answer)
    assert dispatch(["generate", str(folder), "--prompt", "abc", *FEW]) == 0
    assert found == [(True, None)]


def test_a_decoder_that_cannot_continue_a_text_says_so(folder, monkeypatch, capsys):
    monkeypatch.setattr(Pretrained, "remark", "note: it has read no byte")
    monkeypatch.setattr(generate_command, "_generator", lambda *_: None)
    monkeypatch.setattr(generate_command, "_answer", lambda *_: None)
    assert dispatch(["generate", str(folder), "--prompt", "abc", *FEW]) == 0
    assert capsys.readouterr().err == "note: it has read no byte\n"


def test_own_tokenizer_chat_and_stop_tokens(folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    library.add_special_tokens([BEGIN, END])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    prompt = tokenizer.encode_chat([Message("user", "why?")])
    free = answer_of(tmp_path, prompt)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[3], free[4]]}))
    (tmp_path / "why.txt").write_text("why?", "utf-8")
    assert dispatch(["generate", str(tmp_path), "--chat", "--prompt_file", str(tmp_path / "why.txt"), *FEW]) == 0
    ends = min(free.index(free[3]), free.index(free[4])) + 1
    assert capsys.readouterr().out == tokenizer.decode(free[:ends]) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "given neither --prompt nor --prompt-file"),
        (["--prompt", "a", "--prompt_file", "b"], "given both --prompt and --prompt-file"),
        (["--prompt_file", "nothing.txt"], "--prompt-file nothing.txt cannot be read"),
        (["--prompt", "a", "--temperature", "0.6", "--speculate"], "temperature is 0.6"),
        (["--prompt", "a", "--top_p", "0"], "--top_p is '0', but it must be a number above 0 and at most 1"),
        (["--prompt", "a", "--stop_tokens", "264"], "stop_tokens holds 264"),
    ],
)
def test_bad_input_is_one_sentence(folder, words, message):
    with pytest.raises(UserError, match=message):
        dispatch(["generate", str(folder), *words])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (size, f"its vocabulary of {size} tokens is not that of bytes .259.: put its own tokenizer.json")
        for size in (40, 1025)
    ],
)
def test_a_vocabulary_that_is_not_bytes_is_refused(folder, tmp_path, size, message):
    config = replace(CONFIG, vocab_size=size)
    rng = np.random.default_rng(0)
    shapes = jax.tree.map(lambda x: (size, *x.shape[1:]) if 264 in x.shape else x.shape, load_params(folder, CONFIG))
    params = jax.tree.map(lambda s: rng.random(s, np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    save_params(tmp_path / "small", config, params, dtype="float32")
    with pytest.raises(UserError, match=message):
        dispatch(["generate", str(tmp_path / "small"), "--prompt", "a"])


@pytest.mark.slow
def test_the_command_line(folder):
    line = [sys.executable, "-m", "r1jax", "generate", folder]
    done = subprocess.run([*line, "--prompt", "a", *FEW], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith(b"\n")
    wrong = subprocess.run([*line, "--prompts", "a"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown flag '--prompts' (did you mean '--prompt")
