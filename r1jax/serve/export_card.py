"""The card of an exported model: what it is, what it reads and says, and where it comes from."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1jax import __version__
from r1jax.config import Config
from r1jax.edge.artefact import CARD, FORMAT, SUM, card_sum
from r1jax.serve.export_graph import Exported, Port
from r1jax.train.checkpoint import Checkpoint


def describe_export(
    checkpoint: Checkpoint, config: Config, exported: Exported, kind: str, versions: dict[str, str]
) -> dict[str, Any]:
    """What the card says whatever the target.

    Args:
      checkpoint: What was exported.
      config: As it was exported.
      exported: What the task says of it.
      kind: What reports call the model beside its name.
      versions: Of the packages that wrote it.

    Returns:
      JSON as it stands.
    """
    meta, generated = checkpoint.meta(), checkpoint.config().data.path is None
    trained = {"name": meta["data"]["name"], "fingerprint": meta["data"]["fingerprint"]}
    return {
        "format": FORMAT,
        "task": config.task.name,
        "model": f"r1jax {config.name}, step {checkpoint.step} ({kind})",
        "notice": exported.notice,
        "trained_on": trained | ({"notice": exported.generated} if generated else {}),
        "checkpoint": {"sha256": checkpoint.digest(), "step": checkpoint.step, "name": config.name},
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {"r1jax": __version__, **versions},
        "precision": config.model.precision,
        "modalities": list(config.model.modalities),
        "operating_points": exported.points(),
        **exported.needs(),
    }


def describe_ports(wanted: dict[str, Port], outputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs and outputs, shapes without the batch, which comes first.

    Args:
      wanted: What the model reads.
      outputs: What it gives, by name, with shape and dtype.

    Returns:
      "inputs" and "outputs"; JSON as it stands.
    """
    inputs = {name: port._asdict() | {"shape": list(port.shape)} for name, port in wanted.items()}
    told = {name: {"shape": list(x.shape[1:]), "dtype": str(x.dtype)} for name, x in sorted(outputs.items())}
    return {"inputs": inputs, "outputs": told}


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Writes the card with its own sum.

    Args:
      folder: Of the exported model.
      card: JSON-able, without NaN.
    """
    card = card | {SUM: card_sum(card)}
    (folder / CARD).write_text(json.dumps(card, ensure_ascii=False, indent=1, allow_nan=False) + "\n", "utf-8")
