"""From cases of an .npz file to a FHIR bundle of each."""

import argparse

from .artefact import Artefact, InputError
from .cases import case_inputs, missing_of, read_cases
from .progress import counted
from .report import ReportWriter
from .spelling import FHIR, write_report


def report_findings(asked: argparse.Namespace, artefact: Artefact, created: str, fingerprint: str) -> str:
    """Reads the cases, runs the model on each and writes its report.

    Args:
      asked: The command line.
      artefact: Of the medical task.
      created: Time, as FHIR writes it.
      fingerprint: SHA-256 of the cases.

    Returns:
      What was written, in words.

    Raises:
      InputError: The cases are not as they should be.
    """
    card, texts = artefact.card, artefact.texts
    ids, arrays, record_texts = read_cases(asked.cases, card, texts)
    writer = ReportWriter(
        card,
        texts,
        language=asked.language,
        created=created,
        data=(f"{asked.cases.name}: {len(ids)} cases", fingerprint),
        synthetic=asked.synthetic,
    )
    lacking = [missing_of(card, case_inputs(card, arrays, record_texts, row)) for row in range(len(ids))]
    for case, missing in zip(ids, lacking, strict=True):  # before the first report is written
        if len(missing) == len(card["modalities"]):
            raise InputError(f"case {case!r} has none of {', '.join(missing)}: leave it out or fill it in")
    asked.output.mkdir(parents=True, exist_ok=True)
    for row in counted("cases", len(ids)):
        case, missing = ids[row], lacking[row]
        inputs = case_inputs(card, arrays, record_texts, row)
        text = record_texts[row] if record_texts and "text" in inputs else ""
        table = arrays["table"][row] if "table" in arrays else None
        tree = writer.bundle(case, artefact.predict(inputs), missing, table, text)
        write_report(asked.output, case, tree, FHIR)
    return f"{len(ids)} reports, JSON and XML"
