"""A trained decoder with its text, out of a Hugging Face folder or an r1jax checkpoint alike."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1jax.config import DecoderConfig, MeshConfig, Platform
from r1jax.data.text import Tokenizer, load_tokenizer
from r1jax.data.tokenizer_files import check_bytes, read_files
from r1jax.errors import UserError
from r1jax.hf.config import CONFIG_FILE, read_json
from r1jax.hf.load import load_params, read_config
from r1jax.hf.save import GENERATION_FILE
from r1jax.models.lora import Lora, merge_lora
from r1jax.models.precision import PRECISIONS
from r1jax.parallel.mesh import make_mesh, shard_tree
from r1jax.parallel.platform import start_platform
from r1jax.serve.progress import percent
from r1jax.train.checkpoint import MANIFEST, Checkpoint
from r1jax.train.checkpoints import CheckpointFolder, find_checkpoint
from r1jax.train.quantized import FOLDER, in_four_bits, read_codes


@dataclass(frozen=True)
class Pretrained:
    """A decoder on disk, and what turns its tokens into text."""

    path: Path
    """Hugging Face folder, or one r1jax checkpoint."""
    decoder: DecoderConfig
    files: Path | None
    """Folder of the tokenizer files, or tokenizer.json; None reads bytes."""
    published: dict[str, Any]
    """"config" and "generation_config" of Hugging Face, where the weights have been there."""
    checkpoint: Checkpoint | None
    """None is a Hugging Face folder."""

    @property
    def remark(self) -> str | None:
        """Why it may not continue a text, where its run has shown it none byte by byte."""
        model = None if self.checkpoint is None else self.checkpoint.config().model
        if model is None or "text" not in model.modalities or model.text_merge == 1 or self.published:
            return None
        return (
            f"note: model.text_merge of {self.path} is {model.text_merge}: in this run its decoder has read that many "
            "bytes as one token, made of them by TextSummary, and never a token of one byte, so it cannot continue a "
            "text unless it had learned to before"
        )

    def load(self, platform: Platform, dtype: DTypeLike | None = None) -> dict[str, Any]:
        """Loads the weights onto all devices, adapters of floats merged; says which devices, and how far it is.

        Args:
          platform: Where to compute.
          dtype: Of the weights; None keeps what is stored, and codes are kept always.

        Returns:
          Parameters of the decoder.

        Raises:
          UserError: A file is damaged, the model has no language head, or there is no such platform.
        """
        print(start_platform(platform), file=sys.stderr)
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
        with percent(f"loading {self.path}") as told:
            if self.checkpoint is None:
                return load_params(self.path, self.decoder, mesh=mesh, dtype=dtype, progress=told)
            params = self._restore(mesh, dtype)
            if "lm_head" not in params:
                raise UserError(
                    f"checkpoint {self.checkpoint.path} has no language head (it is of the "
                    f"{self.checkpoint.config().task.name} task): give one of a language model"
                )
            told(1, 1)
            return params

    def _restore(self, mesh: Mesh, dtype: DTypeLike | None) -> dict[str, Any]:
        """The decoder of an r1jax checkpoint; codes stay codes, and adapters of codes apart."""
        if not self.checkpoint.quantized:
            params = self.checkpoint.restore_decoder(mesh, dtype)
            return params if self.checkpoint.adapts_codes else merge_lora(params, self.checkpoint.config().model)
        self.checkpoint.verify()
        params, kinds = read_codes(self.checkpoint.path / FOLDER)
        if "decoder" not in params:
            raise UserError(f"checkpoint {self.checkpoint.path} holds no decoder: give one of a language model")
        decoder = in_four_bits(params, kinds)["decoder"]
        return jax.device_put(decoder, shard_tree(mesh, decoder))

    @property
    def quant(self) -> tuple[str, ...]:
        """Rules by which its weights are codes; none where they are floats."""
        held = self.checkpoint is not None and (self.checkpoint.quantized or self.checkpoint.adapts_codes)
        return self.checkpoint.config().model.quant if held else ()

    @property
    def lora(self) -> Lora:
        """Adapters that are not merged, because they adapt codes."""
        if not self.quant:
            return Lora()
        model = self.checkpoint.config().model
        return Lora(model.lora_rank, model.lora_alpha)

    @property
    def computes_in(self) -> DTypeLike | None:
        """Type of the products of a checkpoint of codes, whose arrays do not say it; None where they do."""
        return PRECISIONS[self.checkpoint.config().model.precision].compute if self.quant else None

    def tokenizer(self) -> Tokenizer:
        """Opens its tokenizer.

        Raises:
          UserError: A file is damaged, or the tokenizer cannot be that of the model.
        """
        opened, size = load_tokenizer(self.files), self.decoder.vocab_size
        if opened.size > size and opened.library:
            raise UserError(f"{self.files}: its tokenizer.json has {opened.size} tokens, but vocab_size is {size}.")
        if not opened.library and self.checkpoint is not None and self.files is not None:
            raise UserError(f"{self.path} was trained with the tokenizer {self.files}, which is not there any more.")
        if not opened.library and (self.checkpoint is None or self.checkpoint.imported):
            again = "put its own tokenizer.json beside the weights"
            check_bytes(size, str(self.path), again if self.checkpoint is None else f"{again}, and import them anew")
        return opened

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that end an answer.

        Args:
          tokenizer: Its own.

        Returns:
          `eos_token_id` of generation_config.json, else of config.json, else what ends a text by the tokenizer; at byte
          level always that.

        Raises:
          UserError: `eos_token_id` is no token.
        """
        for name in ("generation_config", "config") if tokenizer.library else ():
            told = self.published.get(name, {}).get("eos_token_id")
            if told is None:
                continue
            tokens = tuple(told) if isinstance(told, list) else (told,)
            if not all(type(token) is int and token >= 0 for token in tokens):
                raise UserError(
                    f"{self.path}: eos_token_id of {name}.json is {told!r}, but it must be a token or a list of them."
                )
            return tokens
        return () if tokenizer.end is None else (tokenizer.end,)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Its tokenizer files by name, byte for byte; nothing without tokenizer.json."""
        return {} if self.files is None else read_files(self.files)


def open_pretrained(path: Path) -> Pretrained:
    """Opens either kind.

    Args:
      path: Hugging Face folder; or run folder, its checkpoints folder, or one r1jax checkpoint.

    Returns:
      The decoder that it holds.

    Raises:
      UserError: There is none, or it is damaged.
    """
    folders = (path, path / "checkpoints")
    if any((folder / MANIFEST).is_file() or CheckpointFolder(folder).all() for folder in folders):
        return from_checkpoint(path)
    return from_hugging_face(path)


def from_hugging_face(folder: Path) -> Pretrained:
    """Opens a Hugging Face folder.

    Args:
      folder: config.json and safetensors.

    Returns:
      The decoder that it holds.

    Raises:
      UserError: A file is missing or damaged, or r1jax cannot honour what config.json says.
    """
    decoder = read_config(folder)
    published = {"config": read_json(folder / CONFIG_FILE)}
    if (folder / GENERATION_FILE).exists():
        published["generation_config"] = read_json(folder / GENERATION_FILE)
    return Pretrained(folder, decoder, folder, published, None)


def from_checkpoint(path: Path) -> Pretrained:
    """Opens an r1jax checkpoint.

    Args:
      path: Run folder, its checkpoints folder, or one checkpoint.

    Returns:
      Its decoder.

    Raises:
      UserError: There is none, or it is damaged.
    """
    checkpoint = find_checkpoint(path)
    decoder, published = checkpoint.config().model.decoder, checkpoint.meta().get("hugging_face", {})
    if published.get("config", {}).get("vocab_size", decoder.vocab_size) != decoder.vocab_size:
        published = {}  # the run began anew with another tokenizer, whose tokens it does not name
    return Pretrained(checkpoint.path, decoder, checkpoint.tokenizer(), published, checkpoint)
