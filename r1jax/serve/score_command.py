"""`r1jax score`: payments come in row by row, and each is answered with its risk, a line of JSON."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from r1jax.cli import load_arguments
from r1jax.config import Config, Count, Platform, Positive
from r1jax.data.transaction_files import column_names, read_transactions
from r1jax.data.transaction_rows import Row, parse, records
from r1jax.data.transaction_state import KeptHistory
from r1jax.data.transactions import Names, Transactions, joined
from r1jax.errors import UserError
from r1jax.parallel.platform import start_platform
from r1jax.serve.scorer import Scorer, Verdict
from r1jax.tasks.finance.alerts import ALERT, BANDS
from r1jax.tasks.finance.reasons import CATALOGUE
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import find_checkpoint

HELP = """\
Scores payments as they come in: rows on standard input, JSON lines or CSV with a header, one line of JSON each on
standard output. Columns are those of the checkpoint. A row of an id and an outcome alone is what became of an earlier
payment. A row that cannot be one is answered with its number and an error, changes nothing, and the next is read.

Leaves with code 0, or 2 where a row was refused or the command is wrong (docs/finance.md).

Examples:
  r1jax score runs/finance --history earlier.parquet < payments.jsonl
  r1jax score runs/finance --history earlier.parquet --state live.state --reasons alerts < payments.csv
"""
FROM_BAND = {"none": len(BANDS), "alerts": ALERT, "all": 0}


@dataclass(frozen=True)
class ScoreArguments:
    """What `r1jax score` is told."""

    checkpoint: str
    """Run folder, its checkpoints folder, or one checkpoint."""
    history: tuple[str, ...] = ()
    """Files of earlier payments, in the order of time, to begin with; not read where --state is there already."""
    state: str | None = None
    """File that keeps what is known, with a journal beside it: the same command goes on after a crash, at the next row.
    None forgets everything at the end."""
    save_every: Count = 10_000
    """Rows after which the file is written anew and the journal emptied, which takes a moment."""
    reasons: Literal["none", "alerts", "all"] = "none"
    """Which payments are explained, against a typical one of the history."""
    batch: Count = 1
    """Rows that are scored together, for files: the first is answered when so many are there, or the input ends."""
    alerts_per_day: Positive | None = None
    """Budget of alerts; none takes the checkpoint's `task.finance.alerts`."""
    language: Literal["en", "zh"] = "en"
    """Language of the reasons' texts."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""


def score(words: list[str]) -> int:
    """Scores standard input.

    Args:
      words: The command line after `score`.

    Returns:
      0, or 2 where a row was refused.

    Raises:
      UserError: The checkpoint, the history or the state is not what it must be.
    """
    asked = load_arguments(ScoreArguments, words, "r1jax score", HELP, ("checkpoint",))
    checkpoint = find_checkpoint(Path(asked.checkpoint))
    config = checkpoint.config()
    print(f"{checkpoint.path}: {start_platform(asked.platform)}", file=sys.stderr)
    scorer = Scorer(checkpoint, alerts_per_day=asked.alerts_per_day, batch=asked.batch)
    kept = None
    if asked.state is not None:
        kept = KeptHistory(Path(asked.state), scorer.live.delay, scorer.live.events)
        scorer.live = kept.live
    try:
        _begin(asked, checkpoint, config, scorer, kept)
        return _answer_all(asked, column_names(config.task.finance.columns), scorer, kept)
    finally:
        if kept is not None:
            kept.close()


def _begin(
    asked: ScoreArguments, checkpoint: Checkpoint, config: Config, scorer: Scorer, kept: KeptHistory | None
) -> None:
    """Brings the scorer to where it shall begin: what was kept, or a history, or nothing."""
    digest = np.frombuffer(checkpoint.digest().encode(), np.uint8)
    if kept is not None and (kept.found or kept.rows):
        print(f"{kept.path}: goes on after row {kept.rows}; --history is not read again", file=sys.stderr)
        if np.array_equal(kept.extra.get("checkpoint", ()), digest):
            starts = {name: x for name, x in kept.extra.items() if name != "checkpoint"}
            scorer.start = {name.removeprefix("typical."): x for name, x in starts.items()}
    elif asked.history:
        scorer.read_history(read_history(asked.history, config.task.finance.columns))
        if kept is not None:
            kept.extra = {"checkpoint": digest} | {f"typical.{name}": x for name, x in scorer.start.items()}
            kept.save()
    else:
        print("warning: without --history the first payments of every name have no past", file=sys.stderr)
    if asked.reasons != "none" and scorer.start is None:
        raise UserError(
            f"--reasons {asked.reasons} needs a typical payment to be told against: begin with --history, in a new "
            "--state if there is one"
        )


def read_history(paths: tuple[str, ...], columns: tuple[str, ...]) -> Transactions:
    """Reads files of payments that follow each other.

    Args:
      paths: At least one.
      columns: As in `column_names`.

    Returns:
      All payments.

    Raises:
      UserError: They are no stream of payments.
    """
    table = read_transactions(paths[0], columns)
    for path in paths[1:]:
        table = joined(table, read_transactions(path, columns), path, column_names(columns))
    return table


def _answer_all(asked: ScoreArguments, names: Names, scorer: Scorer, kept: KeptHistory | None) -> int:
    """Reads, scores, puts on record and answers, until the input ends."""
    refused, saved = 0, kept.rows if kept is not None else 0
    numbered = enumerate(records(_lines(sys.stdin.buffer)), 1)
    while chunk := list(islice(numbered, asked.batch)):
        parsed = [(number, _parsed(record, names)) for number, record in chunk]
        rows = [row for _, row in parsed if isinstance(row, Row)]
        answers = scorer(rows, FROM_BAND[asked.reasons])
        if kept is not None:
            kept.note([row for row, answer in zip(rows, answers, strict=True) if not isinstance(answer, UserError)])
        found = iter(zip(rows, answers, strict=True))
        for number, row in parsed:
            told = _told(*next(found), asked.language) if isinstance(row, Row) else {"error": str(row)}
            refused += "error" in told
            print(json.dumps({"row": number} | told, ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()
        if kept is not None and kept.rows - saved >= asked.save_every:
            kept.save()
            saved = kept.rows
    if kept is not None:
        kept.save()
    if refused:
        print(f"{refused} rows were refused; their answers say why", file=sys.stderr)
    return 2 if refused else 0


def _lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines as they come; what is not UTF-8 is kept in a form that `parse` refuses."""
    for line in stream:
        yield line.decode("utf-8", "surrogateescape")


def _parsed(record: dict[str, Any] | UserError, names: Names) -> Row | UserError:
    if isinstance(record, UserError):
        return record
    try:
        return parse(record, names)
    except UserError as error:
        return error


def _told(row: Row, answer: Verdict | bool | UserError, language: Literal["en", "zh"]) -> dict[str, Any]:
    """The answer to a row, without its number."""
    if isinstance(answer, UserError):
        return {"id": row.id, "error": str(answer)}
    if isinstance(answer, bool):
        return {"id": row.id, "fraud": row.fraud, "held": answer}
    told = {"id": row.id, "score": answer.score, "probability": answer.probability}
    told |= {"band": answer.band, "action": answer.action}
    if answer.explanation is None:
        return told
    reasons = [
        {"code": code, "text": CATALOGUE[code][language], "contribution": gain} | ({"span": span} if span else {})
        for code, gain, span in answer.reasons
    ]
    return told | {"reasons": reasons, "complete": answer.explanation.complete}
