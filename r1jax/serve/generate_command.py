"""The command `r1jax generate`: a checkpoint folder and a prompt in, text out as it comes."""

import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import jax

from r1jax.cli import load_arguments
from r1jax.config import DecoderConfig, GenerationSettings, MeshConfig, Platform, Seed
from r1jax.data import tokenizer as byte_level
from r1jax.data.chat import Message, check_template
from r1jax.data.text import TextStream, Tokenizer, load_tokenizer
from r1jax.errors import UserError
from r1jax.hf.config import CONFIG_FILE, read_json
from r1jax.hf.load import load_params, read_config
from r1jax.hf.save import GENERATION_FILE
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.platform import start_platform
from r1jax.serve.generate import Generator
from r1jax.serve.progress import progress
from r1jax.serve.prompts import check_settings

HELP = """\
r1jax generate FOLDER: goes on from a prompt with a Hugging Face checkpoint (DeepSeek-V2, V3, R1).
The answer goes to standard output as it comes; devices, speed and acceptance go to standard error.

Examples:
  r1jax generate DeepSeek-R1 --chat --prompt "Is 97 prime?" --temperature 0.6 --top_p 0.95
  r1jax generate DeepSeek-V3 --prompt_file question.txt --speculate --max_new_tokens 500
"""
BYTE_VOCABULARY = 1024
"""Bytes need 259 tokens; a vocabulary above this was made by another tokenizer."""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(GenerationSettings):
    """What `r1jax generate` is told."""

    folder: str
    """Hugging Face checkpoint."""
    prompt: str | None = None
    """Text to go on from."""
    prompt_file: str | None = None
    """UTF-8 file that holds the text instead."""
    chat: bool = False
    """Puts the text as a user's question in R1's chat form; the answer begins with the thoughts."""
    seed: Seed = 0
    """Of the draws; the same seed, prompt and settings give the same answer."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights, products and cache; None keeps what is stored (block fp8 becomes bfloat16)."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""


def generate(words: list[str]) -> int:
    """Runs `r1jax generate`.

    Args:
      words: After the command's name.

    Returns:
      The exit code.

    Raises:
      UserError: The checkpoint or the prompt cannot be read, or the settings do not fit the model.
    """
    asked = load_arguments(GenerateArguments, words, "r1jax generate", HELP, ("folder",))
    folder = Path(asked.folder)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    settings = _settings(asked, folder, config, tokenizer)
    text = _prompt(asked)
    if asked.chat:
        check_template(folder)
        prompt = tokenizer.encode_chat([Message("user", text)])
    else:
        prompt = tokenizer.encode(text)
    print(start_platform(asked.platform), file=sys.stderr)
    with progress(f"loading {folder}, %", 100) as steps:
        params = load_params(
            folder,
            config,
            mesh=make_mesh(MeshConfig(data=1, fsdp=-1)),
            dtype=asked.dtype,
            progress=lambda done, total: steps.advance(100 * done // total - steps.done),
        )
    dtype = jax.tree.leaves(params["embed_tokens"])[0].dtype
    _answer(Generator(config, params, dtype=dtype), prompt, settings, asked.seed, tokenizer)
    return 0


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer.

    Args:
      folder: The checkpoint.
      tokenizer: From `load_tokenizer`.

    Returns:
      `eos_token_id` of generation_config.json, else of config.json; at byte level the byte tokenizer's own.

    Raises:
      UserError: A file is no JSON object, or its `eos_token_id` is no token.
    """
    if tokenizer.library is None:
        return (byte_level.EOS,)
    for name in (GENERATION_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            continue
        told = read_json(folder / name).get("eos_token_id")
        if told is None:
            continue
        tokens = tuple(told) if isinstance(told, list) else (told,)
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise UserError(f"{folder / name}: eos_token_id is {told!r}, but it must be a token or a list of them.")
        return tokens
    return ()


def _settings(
    asked: GenerateArguments, folder: Path, config: DecoderConfig, tokenizer: Tokenizer
) -> GenerationSettings:
    """The settings, checked before the weights are read; the checkpoint's own stop tokens end an answer too."""
    values = {item.name: getattr(asked, item.name) for item in fields(GenerationSettings)}
    values["stop_tokens"] = tuple(dict.fromkeys([*values["stop_tokens"], *stop_tokens(folder, tokenizer)]))
    settings = GenerationSettings(**values)
    check_settings(config, settings)
    if tokenizer.size > config.vocab_size:
        what = "its tokenizer.json has" if tokenizer.library else "it has no tokenizer.json, and bytes need"
        raise UserError(
            f"{folder}: {what} {tokenizer.size} tokens, but vocab_size is {config.vocab_size}: "
            "add the checkpoint's own tokenizer.json."
        )
    if tokenizer.library is None and config.vocab_size > BYTE_VOCABULARY:
        raise UserError(
            f"{folder} has no tokenizer.json, and a vocabulary of {config.vocab_size} tokens is not bytes: "
            "add the checkpoint's own tokenizer.json."
        )
    return settings


def _prompt(asked: GenerateArguments) -> str:
    """The text that was given in one of two ways."""
    if (asked.prompt is None) == (asked.prompt_file is None):
        told = "neither --prompt nor --prompt-file" if asked.prompt is None else "both --prompt and --prompt-file"
        raise UserError(f"r1jax generate was given {told}; give one of them.")
    if asked.prompt is not None:
        return asked.prompt
    try:
        return Path(asked.prompt_file).read_text("utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {asked.prompt_file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {asked.prompt_file} is no UTF-8 text ({error.reason}).") from None


def _answer(
    generator: Generator, prompt: list[int], settings: GenerationSettings, seed: int, tokenizer: Tokenizer
) -> None:
    """Prints the answer as it comes, and then what it took."""
    stream, count, times = TextStream(tokenizer), [0], []
    for piece in generator.stream([prompt], settings, seed=seed):
        print(stream.push(piece.tokens[0]), end="", flush=True)
        count.append(count[-1] + len(piece.tokens[0]))
        times.append(time.perf_counter())
    print(stream.close())
    told = f"{len(prompt)} tokens read, {count[-1]} given"
    if len(times) > 2:  # compilation is over after the second piece
        told += f", {(count[-1] - count[2]) / (times[-1] - times[1]):.1f} a second"
    if settings.speculate and piece.drafted.sum():
        told += f"; {piece.accepted.sum() / piece.drafted.sum():.0%} of MTP's guesses were right"
    print(told, file=sys.stderr)
