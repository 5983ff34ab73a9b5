"""From raw payments to what the model reads: collation on the host, scaling on the device."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from r1jax.data import tokenizer
from r1jax.data.transaction_history import CHANNELS, FEATURES
from r1jax.data.transactions import DAY
from r1jax.models.r1 import Inputs

HOUR = 3600.0
EVENT_FEATURES = ("amount", "ratio", "risk", "hour", "weekday", "gap", "age", "age_days")
"""Numbers of each event as the model reads them, see `scale_events`."""
STATE_FEATURE = "state"
"""What stands behind them: the state of the event's label."""


def collate(raw: dict[str, Any], modalities: tuple[str, ...], text_tokens: int) -> dict[str, np.ndarray]:
    """Turns a source's batch into a flat dict of arrays of the modalities that the model reads.

    Args:
      raw: What `Source.read_batch` returned.
      modalities: Of the model.
      text_tokens: Longest note, in tokens.

    Returns:
      Arrays with a leading batch axis; numbers as they are, notes as tokens, `target.fraud`, `target.day`, and all
      features as `target.features`, which validation describes (`reference`).
    """
    batch = {name: raw[name] for name in ("target.fraud", "target.day")} | {"target.features": raw["table"]}
    if "series" in modalities:
        batch |= {name: raw[name] for name in ("series", "series_state", "series_valid")}
    if "table" in modalities:
        batch["table"] = raw["table"]
    if "text" in modalities:
        notes = raw.get("text", [""] * len(raw["case_id"]))
        batch["text"], batch["text_valid"] = tokenizer.encode_batch(notes, text_tokens)
    return batch


def scale_events(x: Float[Array, "B S K C"]) -> Float[Array, "B S K 8"]:
    """Brings `CHANNELS` to about -3 to 3, the range that piecewise-linear features cover.

    Args:
      x: Raw numbers of each event.

    Returns:
      Log amount, its ratio to the customer's habit, terminal risk, hour, weekday, log gap, log age, and the age
      in days up to 60: what is compromised for four weeks is found by a threshold on the latter.
    """
    amount, usual, risk, second, weekday, gap, age = (x[..., i] for i in range(len(CHANNELS)))
    scaled = [
        jnp.log1p(amount) - 3.5,
        2 * (jnp.log1p(amount) - jnp.log1p(usual)),
        6 * risk - 3,
        second / (4 * HOUR) - 3,
        weekday - 3,
        _log_time(gap),
        _log_time(age),
        jnp.minimum(age / (10 * DAY), 6.0) - 3,
    ]
    return jnp.stack(scaled, axis=-1)


def _log_time(seconds: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """-3 at 0, 0 at about a day, 3 at about two years."""
    return jnp.minimum(jnp.log1p(seconds / HOUR), 6.4) * (3 / 3.2) - 3


def scale_features(x: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """Brings `FEATURES` to order one: money, ratios and counts by their logarithm."""
    # Of whole rows: of one payment each column is a scalar, and compilers make 34 results of one step of them.
    in_logs, unit, zero = (jnp.asarray(part)[None] for part in _feature_scales())
    logs = jnp.log1p(jnp.where(in_logs, x, 0))
    return jnp.where(in_logs, logs, x) / unit - zero


def _feature_scales() -> tuple[Bool[np.ndarray, " F"], Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """Of each of `FEATURES`: whether it is read by its logarithm, the unit of that, and what lies at zero in units."""
    found = []
    for name in FEATURES:
        if name in ("amount", "customer_usual") or "mean" in name:
            found.append((True, 1.0, 3.5))
        elif "ratio" in name:
            found.append((True, 0.5, 1.4))
        elif "count" in name:
            found.append((True, 1.0, 2.0))
        elif name.endswith("_days"):
            found.append((False, 10.0, 2.0))
        else:
            found.append((False, 0.5, 0.0))
    in_logs, unit, zero = zip(*found, strict=True)
    return np.array(in_logs), np.array(unit, np.float32), np.array(zero, np.float32)


def hide(inputs: Inputs, numbers: Bool[Array, " B"], notes: Bool[Array, " B"]) -> Inputs:
    """Hides streams and features, or the note, of the chosen cases."""
    changes: dict[str, Array] = {}
    for name in ("has_series", "has_table"):
        has = getattr(inputs, name)
        if has is not None:
            changes[name] = has & ~numbers
    if inputs.text_valid is not None:
        changes["text_valid"] = inputs.text_valid & ~notes[:, None]
    return inputs._replace(**changes)
