"""Rewrites the measured tables of benchmarks/README.md from the JSON files in benchmarks/results.

    python benchmarks/tables.py            rewrites what is between the two marker comments
    python benchmarks/tables.py --check    changes nothing; exit code 1 if the tables are not those of the JSON files

A file that is not there yet is said to be missing; a JSON file that no table is made of is named on stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import (  # noqa: E402
    cache,
    data,
    decode,
    decode_phases,
    decode_step,
    edge,
    edge_exports,
    fraud,
    fusion,
    h100,
    hf_loading,
    huge_pages,
    latency,
    lidc,
    lidc_baselines,
    low_bits,
    luna16_folds,
    luna16_peers,
    medical_settings,
    medical_step,
    memory,
    one_device,
    overhead,
    pipeline,
    quantization,
    records,
    scaling,
)
from r1jax.errors import UserError, run_main  # noqa: E402

BEGIN = "<!-- tables: begin (written by benchmarks/tables.py; do not edit by hand) -->"
END = "<!-- tables: end -->"


class Section(NamedTuple):
    """One heading, the JSON files under it, and what makes a table of each."""

    heading: str
    files: dict[str, Callable[[dict], str]]


def luna16(report: dict) -> str:
    """r1jax alone: the peers that its file quotes were measured elsewhere, and have a table of their own."""
    return luna16_peers.table({"r1jax": report["models"]["r1jax"]})


SECTIONS = (
    Section("Settings of the default run", {"medical_settings": medical_settings.table}),
    Section(
        "luna16_fpr_2d: nodule or not, one slice of a candidate",
        {
            "luna16_peers": lambda report: luna16_peers.table(report["models"]),
            "luna16": luna16,
            "luna16_folds": lambda report: luna16_folds.table(report["runs"]),
        },
    ),
    Section(
        "lidc_3d_134: seven ratings of a nodule in 3-D",
        {"lidc_baselines": lambda report: lidc_baselines.table(report["results"]), "lidc": lidc.table},
    ),
    Section(
        "fraud_handbook: is a payment fraud, in the week after what was learned from",
        dict.fromkeys(("fraud_seed0", "fraud_seed1", "fraud_seed2", "fraud_0818", "fraud_bf16"), fraud.table),
    ),
    Section("Time from a payment to its score", {"latency": latency.table, "latency_gpu": latency.table}),
    Section(
        "Credit, sentiment and stocks beside simple models",
        {f"records_{name}": records.table for name in ("uci", "fpb", "stocknet")},
    ),
    Section("Hit rates of the cache", {"cache": cache.table}),
    Section("Reading shuffled cases", {"data": data.table}),
    Section("Decoding with the DeepSeek-V3 decoder", {"decode": decode.table}),
    Section(
        "A step of decoding on one H200", {"decode_step": decode_step.markdown, "decode_phases": decode_phases.markdown}
    ),
    Section("Kernels on one Hopper GPU", {"h100": h100.markdown}),
    Section("Few bits on one GPU", {"low_bits": low_bits.markdown}),
    Section("What rounding costs", {"quantization": lambda report: quantization.summary(report["rows"])}),
    Section("Loading and writing a Hugging Face checkpoint", {"hf_loading": hf_loading.table}),
    Section("Memory and time of a training step", {"memory": memory.table}),
    Section("One compiled program instead of many operations", {"fusion": fusion.table, "fusion_cpu": fusion.table}),
    Section("The loop around the step", {"overhead": overhead.table, "overhead_cpu": overhead.table}),
    Section("Where a step of the default run spends its time", {"medical_step": medical_step.markdown}),
    Section("Memory in huge pages", {"huge_pages": huge_pages.table}),
    Section("A medical checkpoint on one CPU core", {"edge": edge.table}),
    Section(
        "Size and agreement of edge exports",
        {"edge_exports_medical": edge_exports.table, "edge_exports_finance": edge_exports.table},
    ),
    Section("Several devices", {"pipeline": pipeline.table, "scaling": scaling.table, "one_device": one_device.table}),
)


def provenance(name: str, report: dict) -> str:
    """How a file was made, as the file says."""
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items() if version)
    parts = [f"[{name}.json](results/{name}.json): `{report['command']}`", report["hardware"], versions]
    if "seconds" in report:
        parts.append(f"{report['seconds']:,.0f} s")
    return "; ".join(parts) + "."


def tables(folder: Path) -> str:
    """All sections in Markdown."""
    lines: list[str] = []
    for heading, files in SECTIONS:
        lines += [f"### {heading}", ""]
        for name, table in files.items():
            path = folder / f"{name}.json"
            if path.is_file():
                report = json.loads(path.read_text())
                lines += [provenance(name, report), "", table(report), ""]
            else:
                lines += [f"{name}.json: not measured yet.", ""]
    return "\n".join(lines)


def rewrite(text: str, section: str) -> str:
    """Puts the section between the markers.

    Raises:
      UserError: The markers are not there once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise UserError(f"benchmarks/README.md must hold the lines {BEGIN!r} and {END!r} once each, in this order")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="file with the two marker comments")
    args = parser.parse_args(arguments)
    known = {name for section in SECTIONS for name in section.files}
    for path in sorted(args.results.glob("*.json")):
        if path.stem not in known:
            print(f"note: no table is made of {path.name}", file=sys.stderr)
    old = args.readme.read_text("utf-8")
    new = rewrite(old, tables(args.results))
    if args.check:
        print("up to date" if new == old else "out of date: run python benchmarks/tables.py")
        return int(new != old)
    args.readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
