"""The command `r1jax generate`: a checkpoint and a prompt in, text out as it comes."""

import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from r1jax.arguments import GenerationSettings
from r1jax.cli import load_arguments
from r1jax.config import Platform, Seed
from r1jax.data.chat import Message, check_template
from r1jax.data.text import TextStream, Tokenizer
from r1jax.errors import UserError
from r1jax.serve.generate import Generator
from r1jax.serve.pretrained import Pretrained, open_pretrained
from r1jax.serve.prompts import check_settings

HELP = """\
r1jax generate FOLDER: goes on from a prompt with a Hugging Face checkpoint (DeepSeek-V2, V3, R1), with what
`r1jax hf import` made of one, or with the language model that a run has trained or `r1jax quantize` has made of one;
each with its own tokenizer.
The answer goes to standard output as it comes; devices, speed and acceptance go to standard error.

Examples:
  r1jax generate DeepSeek-R1 --chat --prompt "Is 97 prime?" --temperature 0.6 --top_p 0.95
  r1jax generate DeepSeek-V3 --prompt_file question.txt --speculate --max_new_tokens 500
  r1jax generate runs/language --prompt "The old "
  r1jax generate runs/language-int8 --prompt "The old " --cache int8
"""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(GenerationSettings):
    """What `r1jax generate` is told."""

    folder: str
    """Hugging Face checkpoint; or run folder, its checkpoints folder, or one r1jax checkpoint."""
    prompt: str | None = None
    """Text to go on from."""
    prompt_file: str | None = None
    """UTF-8 file that holds the text instead."""
    chat: bool = False
    """Puts the text as a user's question in R1's chat form; the answer begins with the thoughts."""
    seed: Seed = 0
    """Of the draws; the same seed, prompt and settings give the same answer."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights, products and cache; None keeps what is stored (block fp8 becomes bfloat16). Codes stay codes, and are
    multiplied as model.precision of their run says."""
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
    source = open_pretrained(Path(asked.folder))
    if source.remark:
        print(source.remark, file=sys.stderr)
    tokenizer = source.tokenizer()
    values = {item.name: getattr(asked, item.name) for item in fields(GenerationSettings)}
    values["stop_tokens"] = tuple(dict.fromkeys([*values["stop_tokens"], *source.stop_tokens(tokenizer)]))
    settings = GenerationSettings(**values)
    check_settings(source.decoder, settings)  # before the weights are read
    text = _prompt(asked)
    if asked.chat:
        if source.files is not None:
            check_template(source.files)
        prompt = tokenizer.encode_chat([Message("user", text)])
    else:
        prompt = tokenizer.encode(text)
    _answer(_generator(source, asked), prompt, settings, asked.seed, tokenizer)
    return 0


def _generator(source: Pretrained, asked: GenerateArguments) -> Generator:
    """The decoder with its weights, which nothing else holds then: those that it fuses would be in memory twice."""
    params = source.load(asked.platform, asked.dtype)
    dtype = asked.dtype or source.computes_in or params["embed_tokens"].dtype
    return Generator(source.decoder, params, dtype=dtype, quant=source.quant, lora=source.lora)


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
    told += f"; the cache takes {generator.cache_bytes(settings):,} bytes a token"
    print(told, file=sys.stderr)
