"""From payments of an .npz file to their bands, and a risk report of each alert."""

import argparse
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .artefact import Artefact, InputError
from .cases import read_arrays, refuse_twice, strings_of, text_inputs
from .progress import counted
from .report import NOT_TEXT
from .spelling import RISK_REPORT, write_report

Tree = dict[str, Any]
SPAN = -2_208_988_800, 7_258_118_400
"""Seconds since 1970 of the beginnings of 1900 and 2200."""
SCORES = "scores.jsonl"


def report_risks(asked: argparse.Namespace, artefact: Artefact, created: str, fingerprint: str) -> str:
    """Reads payments, runs the model on each, and writes a line of each and a report of each alert.

    Args:
      asked: The command line.
      artefact: Of the finance task.
      created: Time, as a report writes it.
      fingerprint: SHA-256 of the payments.

    Returns:
      What was written, in words.

    Raises:
      InputError: The payments are not as they should be, or a number cannot be reported.
    """
    card, texts = artefact.card, artefact.texts
    payments = read_payments(asked.cases, card, texts)
    count = len(payments["case_id"])
    made = {
        "model": card["model"],
        "r1jaxVersion": card["versions"]["r1jax"],
        "checkpointSha256": card["checkpoint"]["sha256"],
        "dataName": _one_line(f"{asked.cases.name}: {count} payments"),
        "dataFingerprint": fingerprint,
        "created": created,
    }
    scores = asked.output / SCORES
    if scores.exists():
        raise InputError(f"--output {asked.output} has {SCORES} of an earlier run: name a new folder, or remove it")
    # All of them before anything is written: a number that cannot be reported leaves nothing behind.
    cases, verdicts = payments["case_id"], []
    for row in counted("payments", count):
        verdicts.append(verdict(cases[row], artefact.predict(payment_inputs(card, payments, row)), texts))
    alerts = [row for row, found in enumerate(verdicts) if texts["bands"].index(found["band"]) >= texts["alert"]]
    asked.output.mkdir(parents=True, exist_ok=True)
    for row in alerts:
        tree = risk_report(card, texts, payments, row, verdicts[row], made, asked.language, asked.synthetic)
        write_report(asked.output, cases[row], tree, RISK_REPORT)
    told = ({"id": case} | found for case, found in zip(cases, verdicts, strict=True))
    lines = [json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in told]
    draft = scores.with_suffix(".draft")
    draft.write_text("".join(lines), "utf-8")
    draft.replace(scores)  # it is there once all is
    return f"{count} payments in {SCORES}, {len(alerts)} reports of alerts, JSON and XML"


def read_payments(path: Path, card: Tree, texts: Tree) -> dict[str, Any]:
    """Reads what the model and its reports need of an .npz file.

    Args:
      path: The file: `case_id`, `seconds` since 1970, `customer` and `terminal` of each payment, and the ports of the
        card with a leading axis of payments; the note is `text`, a string each.
      card: Of the artefact.
      texts: Of its reports.

    Returns:
      Lists of strings, times, and arrays of the card's inputs but the text.

    Raises:
      InputError: The file is damaged, or an array is not as the card says.
    """
    arrays, wanted = read_arrays(path), card["inputs"]
    names = ["case_id", "seconds", "customer", "terminal"]
    names += [name for name in wanted if name not in ("text", "text_bytes", "has_numbers")]
    lacking = [name for name in names if name not in arrays]
    if lacking:
        raise InputError(f"{path} lacks the array {lacking[0]!r}: a payment needs {', '.join(names)}")
    count = len(arrays["case_id"]) if arrays["case_id"].ndim else 0
    if not count:
        raise InputError(f"{path} has no payments: give each a `case_id`")
    if "text" in wanted:
        names += [name for name in ("text",) if name in arrays]
    for name in names:
        shape = [count, *(wanted[name]["shape"] if name in wanted and name != "text" else [])]
        if list(arrays[name].shape) != shape:
            raise InputError(
                f"array {name!r} of {path} has shape {list(arrays[name].shape)}: the artefact reads {shape}"
            )
    payments: dict[str, Any] = {name: _filled(path, name, arrays) for name in ("case_id", "customer", "terminal")}
    refuse_twice(path, payments["case_id"])
    payments["seconds"] = _times(path, arrays["seconds"])
    payments["text"] = strings_of(path, "text", arrays) if "text" in names else [""] * count
    ports = [name for name in names[4:] if name != "text"]
    payments |= {name: _numbers(path, name, arrays[name], wanted[name]["dtype"]) for name in ports}
    if (payments["series"][..., texts["amount"]] < 0).any():
        raise InputError(f"array 'series' of {path} holds a negative amount: correct it")
    return payments


def _times(path: Path, seconds: np.ndarray) -> list[int]:
    """Times of payments, whole seconds since 1970."""
    if seconds.dtype.kind not in "iu" or not ((seconds >= SPAN[0]) & (seconds < SPAN[1])).all():
        raise InputError(f"array 'seconds' of {path} holds other than whole seconds since 1970, from 1900 to 2199")
    return seconds.tolist()


def _filled(path: Path, name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names that are never empty; any characters, and spaces around them, are theirs, as r1jax takes payments."""
    found = strings_of(path, name, arrays)
    if not all(_one_line(value).strip() for value in found):
        raise InputError(f"array {name!r} of {path} has an empty name: give every payment a {name}")
    return found


def _numbers(path: Path, name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """An array as the model reads it: finite, states 0 to 2, and every payment the last event of its streams."""
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise InputError(f"array {name!r} of {path} holds what is no finite number: correct it")
    if name == "series_state" and not np.isin(values, (0, 1, 2)).all():
        raise InputError(f"array {name!r} of {path} holds other states than 0, 1 and 2: correct it")
    if name == "series_valid" and not (np.isin(values, (0, 1)).all() and values[..., -1].all()):
        raise InputError(f"array {name!r} of {path}: the last event of both streams is the payment itself, so it is 1")
    with np.errstate(over="ignore"):
        read = values.astype(dtype)
    if not np.isfinite(read).all():
        raise InputError(f"array {name!r} of {path} holds a number that is too large for {dtype}: correct it")
    return read


def payment_inputs(card: Tree, payments: dict[str, Any], row: int) -> dict[str, np.ndarray]:
    """The inputs of one payment."""
    wanted = card["inputs"]
    inputs = {name: np.asarray(payments[name][row]) for name in wanted if name in payments and name != "text"}
    inputs["has_numbers"] = np.asarray(True)
    return inputs | (text_inputs(payments["text"][row], wanted["text"]["shape"][0]) if "text" in wanted else {})


def verdict(case: str, found: dict[str, np.ndarray], texts: Tree) -> Tree:
    """What follows for a payment, as `r1jax score` answers.

    Args:
      case: Its id.
      found: From `Artefact.predict`.
      texts: Bands and actions.

    Returns:
      "score", "probability", "band" and "action".

    Raises:
      InputError: A number is no probability.
    """
    # str() gives the shortest digits that are still the same number in float32.
    told: Tree = {name: float(str(np.float32(found[name]))) for name in ("score", "probability")}
    for name, value in told.items():
        if not 0 <= value <= 1 + 1e-6:
            raise InputError(f"payment {case!r}: its {name} is {value}, which cannot be reported: check its input")
        told[name] = min(value, 1.0)
    band = int(found["band"])
    return told | {"band": texts["bands"][band], "action": texts["actions"][band]}


def risk_report(
    card: Tree, texts: Tree, payments: dict[str, Any], row: int, found: Tree, made: Tree, language: str, synthetic: bool
) -> Tree:
    """Words one alert: the report of r1jax's eval.py without reasons.

    Args:
      card: Of the artefact.
      texts: Of its reports.
      payments: From `read_payments`.
      row: Which of them.
      found: From `verdict`.
      made: What made the score.
      language: en or zh.
      synthetic: Whether the payment was generated.

    Returns:
      The tree of the report.
    """
    (policy,) = card["operating_points"].values()
    return {
        "caseId": _one_line(payments["case_id"][row]),
        "status": "preliminary",
        "synthetic": synthetic,
        "language": language,
        "provenance": made,
        "resourceType": "RiskReport",
        "notice": texts["notice"],
        "time": datetime.fromtimestamp(payments["seconds"][row], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "customer": _one_line(payments["customer"][row]),
        "terminal": _one_line(payments["terminal"][row]),
        # Both streams end with the payment itself.
        "amount": float(str(payments["series"][row, 0, -1, texts["amount"]])),
        **found,
        "operatingPoint": {
            "threshold": policy["review"],
            "sensitivity": policy["recall"],
            "specificity": 1 - policy["false_positive_rate"],
            "nPositive": policy["n_positive"],
            "nNegative": policy["n_negative"],
            "unit": "per transaction",
            "origin": policy["origin"],
        },
        "stepUpThreshold": policy["step_up"],
        "blockProbability": policy["block"],
    }


def _one_line(text: str) -> str:
    """The text as a report can carry it in one line."""
    return re.sub(f"[\t\n\r{NOT_TEXT}]", " ", text)
