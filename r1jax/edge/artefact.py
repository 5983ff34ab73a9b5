"""An exported model on disk: verified, opened and run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "r1jax export 1"
CARD, TEXTS, RUNNER = "card.json", "report.json", "r1jax_edge.pyz"
SUM = "card_sha256"
"""Key of the card's own sum: thresholds and limits stand in the card, so it is as much the model as the weights are."""


class InputError(Exception):
    """What a user can mend: one sentence, exit code 2."""


class Artefact:
    """An exported model: its card, the texts of its reports and its interpreter."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Opens it after comparing every file with the sums of the card.

        Args:
          folder: What `r1jax export --to litert` wrote.
          threads: That the interpreter uses.

        Raises:
          InputError: A file is missing or altered, or this file is of another version.
        """
        self.card = _read_json(folder / CARD)
        if not isinstance(self.card, dict) or self.card.get("format") != FORMAT:
            raise InputError(f"{folder / CARD} is no card of {FORMAT!r}: export the checkpoint again")
        sums = self.card.get("sha256")
        if self.card.get(SUM) != card_sum(self.card):
            raise InputError(f"{folder / CARD} is not what was exported: copy the folder again")
        needed = [self.card.get("file"), TEXTS, RUNNER]
        if not isinstance(sums, dict) or any(name not in list(sums) for name in needed):
            raise InputError(f"{folder / CARD} has no sum of some file: export the checkpoint again")
        for name, expected in sums.items():
            if not (folder / name).is_file() or _sha256((folder / name).read_bytes()) != expected:
                raise InputError(f"{folder / name} is missing or not what was exported: copy the folder again")
        self.texts = _read_json(folder / TEXTS)
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise InputError("the package ai-edge-litert is not installed: pip install ai-edge-litert") from None
        self.interpreter = Interpreter(model_path=str(folder / self.card["file"]), num_threads=threads)
        self.interpreter.allocate_tensors()
        self.run = self.interpreter.get_signature_runner("serving_default")

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one case.

        Args:
          inputs: Of the card's names, shapes and types, without the batch.

        Returns:
          Findings, and `call.FINDING`: 1 present, 0 absent; without the batch.
        """
        found = self.run(**{name: value[None] for name, value in inputs.items()})
        return {name: np.array(value[0]) for name, value in found.items()}


def card_sum(card: dict[str, Any]) -> str:
    """Sums up a card.

    Args:
      card: JSON-able; its own sum is left out.

    Returns:
      SHA-256 of its JSON in one spelling: sorted keys, no spaces, ASCII.
    """
    rest = {name: value for name, value in card.items() if name != SUM}
    return _sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): export the checkpoint again, or copy the folder") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
