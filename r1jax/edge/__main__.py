"""The command: `python r1jax_edge.pyz cases.npz --output reports` reads cases and writes a report of each."""

import argparse
import datetime
import hashlib
import sys
from pathlib import Path

from .artefact import Artefact, InputError
from .cases import case_inputs, missing_of, read_cases
from .report import ReportWriter
from .spelling import file_name, to_json, to_xml


def main() -> None:
    """Runs the command; bad input is one line on stderr and exit code 2."""
    here = Path(sys.argv[0]).resolve().parent
    parser = argparse.ArgumentParser("r1jax_edge.pyz", description=__doc__)
    parser.add_argument("cases", type=Path, help=".npz file of cases, as docs/data.md of r1jax describes it")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="folder of the reports")
    parser.add_argument("--model", type=Path, default=here, help="exported folder; by default that of this file")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the texts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--synthetic", action="store_true", help="the cases were generated: the reports say so")
    try:
        count = write_reports(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where, why = error.filename or "the disk", error.strerror or error
        print(f"error: {where}: {why}; name another --output or file of cases, or make room", file=sys.stderr)
        sys.exit(2)
    print(f"{count} reports, JSON and XML")


def write_reports(asked: argparse.Namespace) -> int:
    """Reads the cases, runs the model on each and writes its report.

    Args:
      asked: The command line.

    Returns:
      Number of cases.

    Raises:
      InputError: The artefact or the cases are not as they should be.
    """
    if asked.threads < 1:
        raise InputError(f"--threads {asked.threads}: give 1 or more")
    artefact = Artefact(asked.model, asked.threads)
    card, texts = artefact.card, artefact.texts
    ids, arrays, record_texts = read_cases(asked.cases, card, texts)
    # As the fingerprint of a folder with this one file.
    digest = hashlib.sha256(hashlib.sha256(asked.cases.read_bytes()).digest()).hexdigest()
    writer = ReportWriter(
        card,
        texts,
        language=asked.language,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        data=(f"{asked.cases.name}: {len(ids)} cases", digest),
        synthetic=asked.synthetic,
    )
    asked.output.mkdir(parents=True, exist_ok=True)
    for row, case in enumerate(ids):
        inputs = case_inputs(card, arrays, record_texts, row)
        missing = missing_of(card, inputs)
        if len(missing) == len(card["modalities"]):
            raise InputError(f"case {case!r} has none of {', '.join(missing)}: leave it out or fill it in")
        text = record_texts[row] if record_texts and "text" in inputs else ""
        table = arrays["table"][row] if "table" in arrays else None
        tree = writer.bundle(case, artefact.predict(inputs), missing, table, text)
        name = file_name(case)
        (asked.output / f"{name}.json").write_text(to_json(tree), "utf-8")
        (asked.output / f"{name}.xml").write_text(to_xml(tree), "utf-8")
    return len(ids)


if __name__ == "__main__":
    main()
