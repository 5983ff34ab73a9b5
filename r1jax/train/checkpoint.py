"""One checkpoint: its files, the manifest that they are held against, and its arrays."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1jax.config import Config, from_dict
from r1jax.disk import sha256
from r1jax.errors import UserError
from r1jax.parallel.agree import from_first
from r1jax.parallel.mesh import shard_tree
from r1jax.train.quantized import coded, holds_codes
from r1jax.train.ranges import split_ranges

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""Folder of a checkpoint that holds the tokenizer files of its text, where that is not bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Steps done when it was written; an import, whose folder has any name, says so within."""
        return int(self.path.name if self.path.name.isdigit() else self.meta()["step"])

    @property
    def imported(self) -> bool:
        """Whether it holds the weights of another program, which was trained on data that nobody knows."""
        return "data" not in self.meta()

    @property
    def quantized(self) -> bool:
        """Whether it holds the codes of a quantized model in the place of a state; only such a model reads them."""
        return (self.path / "quantized").is_dir()

    @property
    def adapts_codes(self) -> bool:
        """Whether it holds codes beside adapters of them, in a state that training goes on from."""
        return not self.quantized and holds_codes(self.config())

    def refuse_codes(self) -> None:
        """Refuses what would need the adapters merged.

        Raises:
          UserError: They adapt codes.
        """
        if self.adapts_codes:
            raise UserError(
                f"{self.path} holds adapters on codes (model.quant {' '.join(self.config().model.quant)}), and the sum "
                "would have to be rounded anew: eval.py and `r1jax generate` take it as it is; for anything else train "
                "the adapters without model.quant"
            )

    def config(self) -> Config:
        """The config it was trained with; fields that came after it was written have their defaults."""
        return from_dict(_read_json(self.path / "config.json"), str(self.path / "config.json"), stored=True)

    def meta(self) -> dict[str, Any]:
        """Validation figures, operating points, data and versions."""
        return _read_json(self.path / "meta.json")

    def digest(self) -> str:
        """SHA-256 (hex) of the manifest, and so of every byte of the checkpoint."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def tokenizer(self) -> Path | None:
        """Finds the tokenizer of its text.

        Returns:
          The verified folder within the checkpoint; in one that has none, what its config names; None is bytes.

        Raises:
          UserError: A file is missing, truncated or altered.
        """
        if self.verify(f"{TOKENIZER}/"):
            return self.path / TOKENIZER
        named = self.config().data.tokenizer
        return None if named is None else Path(named)

    def verify(self, within: str = "", seen: Callable[[], None] = lambda: None) -> int:
        """Compares files with the manifest.

        Args:
          within: Only those whose names start so.
          seen: Is called after each file.

        Returns:
          How many they are.

        Raises:
          UserError: A file is missing, truncated or altered.
        """
        manifest = {k: v for k, v in _read_json(self.path / MANIFEST).items() if k.startswith(within)}
        for name, expected in manifest.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"checkpoint {self.path} is damaged: {name} is missing; use another checkpoint")
            if sha256(file) != expected:
                raise UserError(
                    f"checkpoint {self.path} is damaged: {name} is not what was written (truncated or altered); "
                    "use another checkpoint"
                )
            seen()
        return len(manifest)

    def restore(self, abstract: Any, seen: Callable[[], None] = lambda: None) -> Any:
        """Verifies and reads the state.

        Args:
          abstract: Tree of `jax.ShapeDtypeStruct` with shardings, of the shapes that the config gives.
          seen: Is called after each file that is verified.

        Returns:
          The state, on the devices of the shardings.

        Raises:
          UserError: The checkpoint is damaged, or its arrays are not those of the model.
        """
        from_first(lambda: self.verify(seen=seen))
        return self.load(abstract)

    def load(self, abstract: Any) -> Any:
        """Reads the state of a checkpoint that has been verified; as `restore`."""
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore((self.path / "state").absolute(), abstract)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.path} was written by r1jax {self.meta()['versions']['r1jax']} with a model of other "
                "arrays: use that version, or train anew in another --workdir"
            ) from error

    def stored(self) -> dict[str, Any]:
        """What the state holds: a tree of shapes and dtypes, the fields of tuples by their names.

        Raises:
          UserError: It is quantized, so that there is no state to go on from.
        """
        if self.quantized:
            raise UserError(
                f"{self.path} is quantized: eval.py, `r1jax generate` and adapters (--train.init with model.lora_rank) "
                "take it; for anything else give the checkpoint that it was made from"
            )
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.metadata((self.path / "state").absolute()).item_metadata.tree

    def read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Reads a part of the state, without verifying it.

        Args:
          wanted: Tree of `jax.ShapeDtypeStruct`; arrays with a sharding go straight to its devices, in the dtype that
            is wanted, and the others become NumPy arrays.

        Returns:
          The arrays.
        """
        plain = ocp.RestoreArgs(restore_type=np.ndarray)
        how = jax.tree.map(
            lambda x: plain if x.sharding is None else ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), wanted
        )
        asked = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore((self.path / "state").absolute(), args=asked)

    def find_decoder(self) -> tuple[str, dict[str, Any]]:
        """Verifies the checkpoint and looks for its decoder: the averaged weights where there are some.

        Returns:
          The group of the state that it lies in, and its tree of shapes and dtypes, without ranges of activations.

        Raises:
          UserError: The checkpoint is damaged or holds no decoder.
        """
        self.verify()
        stored = self.stored()
        group = next((g for g in ("ema", "params") if "decoder" in (stored.get(g) or {})), None)
        if group is None:
            raise UserError(f"checkpoint {self.path} holds no decoder: give one that r1jax has trained or imported")
        return group, split_ranges(stored[group]["decoder"])[1]

    def restore_decoder(self, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> dict[str, Any]:
        """Verifies the checkpoint and reads its decoder alone: the averaged weights where there are some.

        Args:
          mesh: Devices to spread it over; None gives NumPy arrays.
          dtype: What to read arrays as on a mesh; None keeps what is stored, and a router in fp32 and codes stay so.

        Returns:
          Parameters of the decoder.

        Raises:
          UserError: The checkpoint is damaged or holds no decoder.
        """
        group, described = self.find_decoder()

        def shape(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
            router = any(getattr(part, "key", None) == "gate" for part in path) and x.dtype == np.float32
            codes = isinstance(path[-1], jax.tree_util.GetAttrKey)
            return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None or router or codes else dtype)

        wanted = jax.tree_util.tree_map_with_path(shape, coded(described))
        if mesh is not None:
            wanted = abstract_like(wanted, shard_tree(mesh, wanted))
        return self.read({group: {"decoder": wanted}})[group]["decoder"]


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state with the shardings that it shall have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; use another one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged; use another one") from None
