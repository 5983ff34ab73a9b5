"""The commands `r1jax hf ...`: checkpoints in and out, logits, and the comparison with a reference."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from r1jax.cli import load_arguments
from r1jax.config import Config, Count, MeshConfig, ModelConfig, Platform, TaskConfig, TrainConfig
from r1jax.data import tokenizer as byte_level
from r1jax.data.tokenizer_files import TOKENIZER, byte_files
from r1jax.errors import UserError
from r1jax.hf.forward import token_logits
from r1jax.hf.save import SHARD_BYTES, Dtype, save_params
from r1jax.hf.verify import table, verify
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.platform import start_platform
from r1jax.serve.pretrained import Pretrained, from_checkpoint, from_hugging_face
from r1jax.serve.progress import percent, progress
from r1jax.train.checkpoints import write_sealed
from r1jax.train.lazy import lazy_decoder
from r1jax.train.provenance import provenance

TEXT_TOKENS = 1024
"""Longest sequences in which eval.py scores an import."""
IMPORT_HELP = """\
r1jax hf import FOLDER OUTPUT: makes a weights-only r1jax checkpoint of a Hugging Face one (DeepSeek-V2, V3, R1).
tokenizer.json and what belongs to it are taken along, byte for byte; nothing in the folder is run.

Examples:
  r1jax hf import DeepSeek-V2-Lite runs/v2-lite
  r1jax hf import DeepSeek-R1 runs/r1 --mtp False --dtype bfloat16
"""
EXPORT_HELP = """\
r1jax hf export CHECKPOINT OUTPUT: writes the decoder of an r1jax checkpoint so that `transformers` loads it,
with the tokenizer files of its text, or with those of a byte-level tokenizer.

Examples:
  r1jax hf export runs/v2-lite exported
  r1jax hf export runs/medical exported --dtype bfloat16
"""
LOGITS_HELP = """\
r1jax hf logits FOLDER: next-token logits of a Hugging Face checkpoint.

Examples:
  r1jax hf logits DeepSeek-V2-Lite --input ids.npy --output logits.npy
"""
VERIFY_HELP = """\
r1jax hf verify FOLDER: compares with reference.npz beside the checkpoint, or else with `transformers`.
Exit code 0: within tolerance; 1: beyond; 2: nothing to compare with.

Examples:
  r1jax hf verify DeepSeek-V2-Lite
"""


@dataclass(frozen=True)
class ImportArguments:
    """What `r1jax hf import` is told."""

    folder: str
    """Hugging Face checkpoint: config.json and safetensors."""
    output: str
    """Folder of the new checkpoint; must not exist or be empty."""
    dtype: Dtype | None = None
    """None keeps what is stored; block fp8 becomes bfloat16."""
    mtp: bool = True
    """False leaves the multi-token prediction module out."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""


@dataclass(frozen=True)
class ExportArguments:
    """What `r1jax hf export` is told."""

    checkpoint: str
    """Run folder, its checkpoints folder, or one checkpoint; averaged weights are taken where there are some."""
    output: str
    """Folder to write; must not exist or be empty."""
    dtype: Dtype | None = None
    """None keeps what is stored."""
    mtp: bool = True
    """False leaves the multi-token prediction module out, of which transformers reports unexpected tensors."""
    shard_bytes: Count = SHARD_BYTES
    """Largest safetensors file."""


@dataclass(frozen=True)
class LogitsArguments:
    """What `r1jax hf logits` is told."""

    folder: str
    """Hugging Face checkpoint."""
    input: str
    """Tokens: a .npy file of whole numbers [B, T]."""
    output: str
    """Logits: a .npy file, float32 [B, T, V]."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and computation."""
    batch_size: Count = 1
    """Sequences at a time."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""


@dataclass(frozen=True)
class VerifyArguments:
    """What `r1jax hf verify` is told."""

    folder: str
    """Hugging Face checkpoint."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""


def import_folder(words: list[str]) -> int:
    """Runs `r1jax hf import`.

    Args:
      words: After the command's name.

    Returns:
      The exit code.

    Raises:
      UserError: The checkpoint cannot be read, or the new one not be written.
    """
    asked = load_arguments(ImportArguments, words, "r1jax hf import", IMPORT_HELP, ("folder", "output"))
    folder, output = Path(asked.folder), Path(asked.output)
    _refuse_taken(output)
    source = _choose_mtp(from_hugging_face(folder), asked.mtp)
    files = source.tokenizer_files()
    if TOKENIZER not in files:
        files = {}
    params = source.load(asked.platform, asked.dtype)
    most = source.published["config"].get("max_position_embeddings")
    length = most if type(most) is int and 2 < most < TEXT_TOKENS else TEXT_TOKENS
    model = ModelConfig(modalities=("text",), decoder=source.decoder, text_tokens=length)
    config = Config(name=folder.name, model=model, task=TaskConfig(name="language"), train=TrainConfig(ema=0.0))
    meta = {"step": 0, "validation": None, "hugging_face": source.published} | provenance()
    try:
        write_sealed(output.absolute(), {"params": {"decoder": params}}, config, meta, files)
    except OSError as error:
        raise UserError(
            f"{output} could not be written ({error.strerror or error}): make room or name another folder."
        ) from error
    print(_told(output, params, files))
    return 0


def export_folder(words: list[str]) -> int:
    """Runs `r1jax hf export`.

    Args:
      words: After the command's name.

    Returns:
      The exit code.

    Raises:
      UserError: The checkpoint cannot be read, Hugging Face has no such decoder, or the folder cannot be written.
    """
    asked = load_arguments(ExportArguments, words, "r1jax hf export", EXPORT_HELP, ("checkpoint", "output"))
    _refuse_taken(Path(asked.output))
    source = _choose_mtp(from_checkpoint(Path(asked.checkpoint)), asked.mtp)
    if source.remark:
        print(source.remark, file=sys.stderr)
    files, base = source.tokenizer_files(), source.published.get("config")
    if base is None:
        base, files = _own_text(source, files)
    params = lazy_decoder(source.checkpoint)
    if not asked.mtp:
        params.pop("mtp", None)
    with percent(f"writing {asked.output}") as told:
        save_params(
            asked.output,
            source.decoder,
            params,
            dtype=asked.dtype,
            base=base,
            generation=source.published.get("generation_config"),
            tokenizer=files,
            shard_bytes=asked.shard_bytes,
            progress=told,
        )
    print(_told(asked.output, params, files))
    return 0


def _choose_mtp(source: Pretrained, mtp: bool) -> Pretrained:
    """The same without multi-token prediction, where that is not wanted."""
    return source if mtp else replace(source, decoder=replace(source.decoder, num_nextn_predict_layers=0))


def _own_text(source: Pretrained, files: dict[str, bytes]) -> tuple[dict[str, int | None], dict[str, bytes]]:
    """Special tokens for config.json, and the tokenizer files, of a decoder that was never Hugging Face's."""
    opened = source.tokenizer()
    pad = {} if files else {"pad_token_id": byte_level.PAD}
    return {"bos_token_id": opened.first, "eos_token_id": opened.end} | pad, files or byte_files()


def _told(output: str | Path, params: dict, files: dict[str, bytes]) -> str:
    """What was written, for people."""
    text = f"with {', '.join(files)}" if files else "without a tokenizer, since there is no tokenizer.json"
    return f"{output}: a decoder of {sum(x.size for x in _arrays(params)):,} parameters, {text}"


def write_logits(words: list[str]) -> int:
    """Runs `r1jax hf logits`.

    Args:
      words: After the command's name.

    Returns:
      The exit code.

    Raises:
      UserError: Checkpoint or tokens cannot be read, or the logits not be written.
    """
    asked = load_arguments(LogitsArguments, words, "r1jax hf logits", LOGITS_HELP, ("folder",))
    folder, output = Path(asked.folder), Path(asked.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output {output} must be a file in a folder that exists.")
    source = _choose_mtp(from_hugging_face(folder), False)
    decoder = source.decoder
    tokens = _tokens(Path(asked.input), decoder.vocab_size)
    params = source.load(asked.platform, asked.dtype)
    draft = output.with_name(f".{output.name}.draft")
    try:
        with progress("sequences", len(tokens)) as steps, draft.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (*tokens.shape, decoder.vocab_size)}
            )
            for logits in token_logits(decoder, params, tokens, asked.batch_size, jnp.dtype(asked.dtype)):
                file.write(memoryview(np.ascontiguousarray(logits, "<f4")).cast("B"))
                steps.advance(len(logits))
        os.replace(draft, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): make room or name another file.") from error
    finally:
        draft.unlink(missing_ok=True)
    print(f"{output}: float32 [{tokens.shape[0]}, {tokens.shape[1]}, {decoder.vocab_size}]")
    return 0


def verify_folder(words: list[str]) -> int:
    """Runs `r1jax hf verify`.

    Args:
      words: After the command's name.

    Returns:
      0 if everything is within its tolerance, else 1.

    Raises:
      UserError: The checkpoint cannot be read, or there is nothing to compare with.
    """
    asked = load_arguments(VerifyArguments, words, "r1jax hf verify", VERIFY_HELP, ("folder",))
    print(start_platform(asked.platform), file=sys.stderr)
    with percent(f"loading {asked.folder}") as told:
        report = verify(asked.folder, mesh=make_mesh(MeshConfig(data=1, fsdp=-1)), progress=told)
    print(table(report))
    return 0 if report.holds else 1


def _tokens(path: Path, vocabulary: int) -> np.ndarray:
    """Reads and checks tokens."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"--input {path} is no .npy file ({str(error).splitlines()[0]}).") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        told = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise UserError(f"--input {path} holds {told}, but it must be int32 [B, T], not empty.")
    wrong = np.argwhere((tokens < 0) | (tokens >= vocabulary))
    if len(wrong):
        row, column = wrong[0]
        raise UserError(
            f"--input {path}: token {tokens[row, column]} at [{row}, {column}] is outside the vocabulary of "
            f"{vocabulary} tokens."
        )
    return tokens


def _refuse_taken(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty: choose another folder, or delete it.")


def _arrays(params: dict) -> Iterator[np.ndarray]:
    for value in params.values():
        yield from _arrays(value) if isinstance(value, dict) else [value]
