"""The tokenizer files of a checkpoint, byte for byte, and the one reader of what they say; nothing in them is run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from r1jax.data import tokenizer as byte_level
from r1jax.errors import UserError

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", TEMPLATE)
"""What travels with the weights; the first is the tokenizer, and without it there is none."""
LARGEST = 2**26
"""Bytes of a file; the largest published ones have half of that."""
STARTS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>")
"""Tokens that begin a text, as published tokenizers call them."""
ENDS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Tokens that end one."""
BYTE_NAMES = {"pad_token": "<|r1jax_pad|>", "bos_token": "<|r1jax_begin|>", "eos_token": "<|r1jax_end|>"}
"""Special tokens of the byte-level tokenizer, in the order of their numbers, under names that no text has."""
BYTE_VOCABULARY = 1024
"""A vocabulary above this is not that of bytes with some room left."""


@dataclass(frozen=True)
class PublishedTokenizer:
    """What tokenizer.json and tokenizer_config.json say."""

    library: tokenizers.Tokenizer
    """Neither cuts nor pads, and its special tokens are added by whoever encodes."""
    size: int
    """Tokens are below this."""
    first: int | None
    """Token that begins a text: what `add_bos_token` says, else a token of a known name."""
    end: int | None
    """Token that ends a text: `eos_token`, else a token of a known name."""


def read_files(path: Path) -> dict[str, bytes]:
    """Reads the tokenizer files of a folder.

    Args:
      path: The folder, or tokenizer.json itself; a file of another name stands alone.

    Returns:
      Content by name, of those of `FILES` that are there.

    Raises:
      UserError: A file cannot be read, or is too large to be what its name says.
    """
    alone = not path.is_dir() and path.name != TOKENIZER
    folder = path if path.is_dir() else path.parent
    found = {TOKENIZER: path} if alone else {name: folder / name for name in FILES}
    files = {}
    for name, file in found.items():
        try:
            if not file.is_file():
                continue
            if file.stat().st_size > LARGEST:
                raise UserError(f"{file} has {file.stat().st_size:,} bytes, and no tokenizer file has over {LARGEST:,}")
            files[name] = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    return files


def open_published(path: Path) -> PublishedTokenizer | None:
    """Opens a tokenizer.

    Args:
      path: As in `read_files`.

    Returns:
      The tokenizer; None where there is no tokenizer.json.

    Raises:
      UserError: A file cannot be read or is damaged.
    """
    files = read_files(path)
    return _open(files, path) if TOKENIZER in files else None


def _open(files: dict[str, bytes], path: Path) -> PublishedTokenizer:
    folder = path if path.is_dir() else path.parent
    try:
        library = tokenizers.Tokenizer.from_str(files[TOKENIZER].decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        file, reason = path / TOKENIZER if path.is_dir() else path, str(error).splitlines()[0]
        raise UserError(f"{file} is no tokenizer of the tokenizers library ({reason}): download it again.") from None
    library.no_truncation()
    library.no_padding()
    told = _json(files.get(TOKENIZER_CONFIG, b"{}"), folder / TOKENIZER_CONFIG)
    begin, end = (library.token_to_id(_name(told.get(key))) for key in ("bos_token", "eos_token"))
    adds = told.get("add_bos_token")
    return PublishedTokenizer(
        library,
        size=vocabulary_size(library),
        first=None if adds is False else begin if adds and begin is not None else _known(library, STARTS),
        end=_known(library, ENDS) if end is None else end,
    )


def vocabulary_size(library: tokenizers.Tokenizer) -> int:
    """Largest token plus 1, which is more than their number where a vocabulary has holes."""
    return max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def chat_template(path: Path) -> tuple[Path, str] | None:
    """Finds the chat template of a checkpoint, as a text: it is a program of its author, and is never run.

    Args:
      path: As in `read_files`.

    Returns:
      The file that holds it, and the template; None where there is none.

    Raises:
      UserError: A file cannot be read or is damaged.
    """
    files, folder = read_files(path), path if path.is_dir() else path.parent
    if TEMPLATE in files:
        return folder / TEMPLATE, files[TEMPLATE].decode("utf-8", errors="replace")
    told = _json(files.get(TOKENIZER_CONFIG, b"{}"), folder / TOKENIZER_CONFIG).get("chat_template")
    return None if told is None else (folder / TOKENIZER_CONFIG, str(told))


def byte_files() -> dict[str, bytes]:
    """Writes the byte-level tokenizer (`r1jax.data.tokenizer`) as files that the tokenizers library reads.

    Returns:
      tokenizer.json and tokenizer_config.json, whose tokens are those of `encode`.
    """
    # The library spells bytes by the characters that GPT-2 gave them: printable ones stand for themselves.
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {name: token for token, name in enumerate(BYTE_NAMES.values())}
    vocabulary |= {spelled[byte]: byte + byte_level.OFFSET for byte in range(256)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(list(BYTE_NAMES.values()))
    begin = BYTE_NAMES["bos_token"]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, byte_level.BOS)]
    )
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "clean_up_tokenization_spaces": False}
    return {TOKENIZER: library.to_str().encode(), TOKENIZER_CONFIG: json.dumps(told | BYTE_NAMES, indent=2).encode()}


def check_bytes(vocab_size: int, source: str, remedy: str) -> None:
    """Refuses to read text as bytes, for want of a tokenizer, for weights that another tokenizer was trained with.

    Args:
      vocab_size: Of the model.
      source: Where the weights come from, for error messages.
      remedy: What to do.

    Raises:
      UserError: The model has too few tokens for bytes, or far more.
    """
    if not byte_level.VOCAB_SIZE <= vocab_size <= BYTE_VOCABULARY:
        raise UserError(
            f"{source} has no tokenizer.json, and its vocabulary of {vocab_size} tokens is not that of bytes "
            f"({byte_level.VOCAB_SIZE}): {remedy}"
        )


def check_same(given: Path, own: Path | None, flag: str) -> None:
    """Refuses a tokenizer whose tokens mean something else to the weights.

    Args:
      given: What the user names.
      own: What the weights were trained with; None is bytes.
      flag: How it was named, for error messages.

    Raises:
      UserError: A token of the weights' tokenizer is another one, or none, in the given one.
    """
    theirs = _tokens(_opened(given, flag))
    ours = _tokens(_open(byte_files(), given) if own is None else _opened(own, "the checkpoint's tokenizer"))
    wrong = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if wrong is not None:
        there = "none" if wrong not in theirs else f"number {theirs[wrong]}"
        raise UserError(
            f"{flag} {given} is another tokenizer than {own or 'the byte-level one'} of the weights (their token "
            f"{ours[wrong]}, {wrong!r}, is {there} in it): leave it out"
        )


def _opened(path: Path, flag: str) -> PublishedTokenizer:
    found = open_published(path)
    if found is None:
        raise UserError(f"{flag} {path} has no tokenizer.json: give one, or its folder")
    return found


def _tokens(published: PublishedTokenizer) -> dict[str, int]:
    return published.library.get_vocab(with_added_tokens=True)


def _known(library: tokenizers.Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((token for token in map(library.token_to_id, names) if token is not None), None)


def _name(token: Any) -> str:
    """Text of a special token, which is a text or an object that holds it; empty for none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object ({error}): download it again.") from None
    if not isinstance(told, dict):
        raise UserError(f"{path} is no JSON object: download it again.")
    return told
