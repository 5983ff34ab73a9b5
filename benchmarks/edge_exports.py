"""Sizes and agreement of exported edge models, without timings, so that no machine need be idle.

    python benchmarks/edge_exports.py --checkpoints runs/medical --converter PYTHON \\
        --output benchmarks/results/edge_exports_medical.json

--converter has the LiteRT converter (docs/export.md). Cases are those of the checkpoint's test part: neither the
rounding of int8 weights nor its check sees them. An export that is refused has its reason instead of figures.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from r1jax.errors import UserError  # noqa: E402
from r1jax.serve.export_command import export  # noqa: E402
from r1jax.train.checkpoints import find_checkpoint  # noqa: E402

WEIGHTS = ("float", "fp16", "int8")


def measure(checkpoint: Path, weights: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Exports a checkpoint one way; what the card says of it."""
    folder = place / weights
    words = [str(checkpoint), "--to", "litert", "--weights", weights, "--converter", str(args.converter)]
    try:
        export([*words, "--cases", str(args.cases), "--output", str(folder)])
    except UserError as error:
        if weights == "float":  # what all others are held against
            raise
        return {"refused": str(error).replace(str(checkpoint), checkpoint.name).replace(str(folder), "DIR")}
    return row_of(folder)


def row_of(folder: Path) -> dict[str, Any]:
    """Size of an exported folder, and how far it is from the checkpoint, in probability and of lengths in mm."""
    card = json.loads((folder / "card.json").read_text())
    largest: dict[str, float] = {}
    for row in card["agreement"]["findings"].values():
        largest[row["kind"]] = max(largest.get(row["kind"], 0.0), row["largest_difference"])
    return {
        "bytes": (folder / card["file"]).stat().st_size,
        "decisions": card["agreement"]["decisions"],
        "cases": card["agreement"]["data"],
        "largest_difference": largest,
        **({"stored": card["stored"]} if "stored" in card else {}),
    }


def table(report: dict[str, Any]) -> str:
    """Sizes and agreement in Markdown."""
    lines = [
        "| model | weights | MB | smaller than fp32 | same calls | needed | largest difference |",
        "|---" * 7 + "|",
    ]
    for name, ways in report["models"].items():
        for weights, row in ways.items():
            if "refused" in row:
                lines.append(f"| {name} | {weights} | refused | - | - | - | - |")
                continue
            ratio, made = ways["float"]["bytes"] / row["bytes"], row["decisions"]
            apart = ", ".join(f"{kind} {value:.2g}" for kind, value in row["largest_difference"].items())
            same = f"{made['same']:,} of {made['of']:,}"
            size = f"{row['bytes'] / 1e6:.3f} | {ratio:.2f}x"
            lines.append(f"| {name} | {weights} | {size} | {same} | {made['required']:,} | {apart} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", required=True, type=Path, nargs="+", help="runs to export")
    parser.add_argument("--converter", required=True, type=Path, help="Python with the LiteRT converter")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--cases", type=int, default=1600, help="cases that each export is compared on")
    args = parser.parse_args(arguments)
    about = jax_environment(argparse.Namespace(cases=args.cases, overrides=[]))
    names = [f"{found.config().name}, step {found.step}" for found in map(find_checkpoint, args.checkpoints)]
    if len(set(names)) < len(names):
        parser.error("--checkpoints differ neither in config nor in step, by which the table names them: take one each")
    models = {}
    for name, checkpoint in zip(names, args.checkpoints, strict=True):
        with tempfile.TemporaryDirectory() as place:
            models[name] = {weights: measure(checkpoint, weights, args, Path(place)) for weights in WEIGHTS}
    args.output.write_text(json.dumps(about | {"models": models}, indent=1) + "\n")
    print(table({"models": models}))


if __name__ == "__main__":
    main(sys.argv[1:])
