"""An exported model on disk: verified, opened and run."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "r1jax export 1"
CARD, TEXTS, RUNNER = "card.json", "report.json", "r1jax_edge.pyz"
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Inputs of one case to its outputs, with a leading axis of 1."""
SUM = "card_sha256"
"""Key of the card's own sum: thresholds and limits stand in the card, so it is as much the model as the weights are."""


class InputError(Exception):
    """What a user can mend: one sentence, exit code 2."""


class Artefact:
    """An exported model: its card, the texts of its reports and what runs it."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Opens it after comparing every file with the sums of the card.

        Args:
          folder: What `r1jax export --to litert` or `--to iree` wrote.
          threads: That the run time uses.

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
        open_file = open_iree if self.card.get("to") == "iree" else open_litert
        self.run = open_file(folder / self.card["file"], self.card, threads)

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one case.

        Args:
          inputs: Of the card's names, shapes and types, without the batch.

        Returns:
          Findings, and `call.FINDING`: 1 present, 0 absent; without the batch.
        """
        found = self.run({name: value[None] for name, value in inputs.items()})
        return {name: np.array(value[0]) for name, value in found.items()}


def open_litert(file: Path, card: dict[str, Any], threads: int) -> Run:
    """Opens a network of LiteRT.

    Args:
      file: The network.
      card: Of the artefact.
      threads: That the interpreter uses.

    Returns:
      What runs it.

    Raises:
      InputError: LiteRT is missing.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise InputError("the package ai-edge-litert is not installed: pip install ai-edge-litert") from None
    interpreter = Interpreter(model_path=str(file), num_threads=threads)
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner("serving_default")
    return lambda inputs: runner(**inputs)


def open_iree(file: Path, card: dict[str, Any], threads: int) -> Run:
    """Opens a program of IREE.

    Args:
      file: The program; its inputs and outputs are in the order of their names in the card.
      card: Of the artefact.
      threads: That the run time uses.

    Returns:
      What runs it.

    Raises:
      InputError: IREE's run time is missing, or of another version, or this is no CPU of the program's.
    """
    package = f"iree-base-runtime=={card['versions']['iree-base-runtime']}"
    try:
        from iree import runtime
    except ImportError:
        raise InputError(f"the package iree-base-runtime is not installed: pip install {package}") from None
    if threads > 1:
        runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
    context = runtime.SystemContext(config=runtime.Config("local-sync" if threads == 1 else "local-task"))
    try:
        module = runtime.VmModule.copy_buffer(context.instance, file.read_bytes())  # refuses files of other versions
        context.add_vm_module(module)
    except Exception as error:  # which kind depends on what is wrong
        # "Error in a step: file:line: STATUS; why; in what" or "...; why: the whole target"
        why = re.split("[;:\n]", str(error).partition("; ")[2] or str(error))[0]
        made = " ".join(card["compiled_for"].values())
        raise InputError(f"{file} does not run here ({why}): it is compiled for {made} and {package}") from None
    main, names, found = context.modules[module.name]["main"], sorted(card["inputs"]), sorted(card["outputs"])

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = main(*(inputs[name] for name in names))
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]  # of one output, itself
        return {name: x.to_host() for name, x in zip(found, outputs, strict=True)}

    return run


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
