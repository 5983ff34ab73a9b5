"""The command: `python r1jax_edge.pyz cases.npz --output reports` reads cases and writes their reports."""

import argparse
import datetime
import hashlib
import sys
from pathlib import Path

from .artefact import Artefact, InputError
from .findings import report_findings
from .risk import report_risks

REPORTS = {"medical": report_findings, "finance": report_risks}
"""What reads the cases and writes their reports, by the task of the card."""


def main() -> None:
    """Runs the command; bad input is one line on stderr and exit code 2."""
    here = Path(sys.argv[0]).resolve().parent
    parser = argparse.ArgumentParser("r1jax_edge.pyz", description=__doc__)
    parser.add_argument("cases", type=Path, help=".npz file of cases or payments, as docs/export.md of r1jax says")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="folder of the reports")
    parser.add_argument("--model", type=Path, default=here, help="exported folder; by default that of this file")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the texts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--synthetic", action="store_true", help="the cases were generated: the reports say so")
    try:
        told = write_reports(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where, why = error.filename or "the disk", error.strerror or error
        print(f"error: {where}: {why}; name another --output or file of cases, or make room", file=sys.stderr)
        sys.exit(2)
    print(told)


def write_reports(asked: argparse.Namespace) -> str:
    """Reads the cases, runs the model on each and writes the reports.

    Args:
      asked: The command line.

    Returns:
      What was written, in words.

    Raises:
      InputError: The artefact or the cases are not as they should be.
    """
    if asked.threads < 1:
        raise InputError(f"--threads {asked.threads}: give 1 or more")
    artefact = Artefact(asked.model, asked.threads)
    report = REPORTS.get(artefact.card["task"])
    if report is None:
        raise InputError(f"the artefact is of the {artefact.card['task']} task, which this program has no reports of")
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # As the fingerprint of a folder with this one file.
    fingerprint = hashlib.sha256(hashlib.sha256(asked.cases.read_bytes()).digest()).hexdigest()
    return report(asked, artefact, created, fingerprint)


if __name__ == "__main__":
    main()
