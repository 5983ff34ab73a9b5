"""The commands `r1jax runs ...`: what runs there are and how they stand, and how some of them differ."""

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1jax.cli import load_arguments
from r1jax.errors import UserError
from r1jax.serve.run_compare import Comparison, compare, write_picture
from r1jax.serve.run_folder import find_runs, foreign, read_run

LIST_HELP = """\
Lists the runs below a folder: their state, how far they are, and their figures. Nothing is changed.

Examples:
  r1jax runs list
  r1jax runs list runs/sweep --json
"""
COMPARE_HELP = """\
Shows where runs differ: config, versions, data and figures; --output draws their curves over each other.

Examples:
  r1jax runs compare runs/a runs/b
  r1jax runs compare runs/a runs/b runs/c --output curves.html
"""
FIGURES = (
    *("name", "step", "steps", "best_step", "best_score", "headline", "loss", "started", "seconds"),
    *("git", "dirty", "goodput"),
)
"""What a folder that is no run has none of."""
COLUMNS = ("run", "state", "step", "best", "loss", "started", "time", "git", "goodput")


@dataclass(frozen=True)
class ListArguments:
    """Arguments of `r1jax runs list`."""

    folder: str = "runs"
    """A folder of runs, or one run."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class CompareArguments:
    """Arguments of `r1jax runs compare`."""

    runs: tuple[str, ...] = ()
    """Run folders."""
    output: str | None = None
    """Picture of the curves, .svg or .png; .html has the tables too."""
    json: bool = False
    """Print JSON."""


def list_runs(words: list[str]) -> int:
    """Runs `r1jax runs list`.

    Args:
      words: The command line after it.

    Returns:
      The exit code.

    Raises:
      UserError: There is no such folder.
    """
    arguments = load_arguments(ListArguments, words, "r1jax runs list", LIST_HELP, ("folder",))
    found = [describe_run(path) for path in find_runs(Path(arguments.folder))]
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    if not found:
        print(f"{arguments.folder} holds no runs")
        return 0
    show(COLUMNS, [_cells(run) for run in found])
    for run in found:
        for line in filter(None, [run["detail"], *run["problems"]]):
            print(f"{run['run']}: {' '.join(line.split())}")
    return 0


def describe_run(path: Path) -> dict[str, Any]:
    """Sums a run up.

    Args:
      path: Its folder, or one that is no run.

    Returns:
      JSON-able figures; those that are not known are None.
    """
    told = foreign(path)
    if told is not None:
        return dict.fromkeys(FIGURES) | {"run": str(path), "state": "foreign", "detail": told, "problems": []}
    run = read_run(path)
    state, detail = run.state()
    best, made = run.best, run.made()
    return {
        "run": str(path),
        "name": run.config.get("name"),
        "state": state,
        "detail": detail,
        "step": run.step,
        "steps": run.steps,
        "best_step": best and best[0],
        "best_score": best and best[1]["score"],
        "headline": headline(best[1]) if best else None,
        "loss": run.latest("loss"),
        "started": run.events[0]["time"] if run.events else None,
        "seconds": run.seconds() if run.events else None,
        "git": made.get("git"),
        "dirty": made.get("dirty"),
        "goodput": run.latest("goodput"),
        "problems": run.problems,
    }


def headline(validation: dict[str, Any]) -> str | None:
    """The first figure of a validation, of the mode that shows all."""
    figures = validation.get("figures")
    first = next(iter(figures.values()), None) if isinstance(figures, dict) else None
    numbers = first.items() if isinstance(first, dict) else ()
    return next((f"{name} {value:.4g}" for name, value in numbers if isinstance(value, float | int)), None)


def _cells(run: dict[str, Any]) -> list[str]:
    """One row of the table."""

    def number(value: Any, form: str) -> str:
        return format(value, form) if isinstance(value, float | int) else "-"

    best = number(run["best_score"], ".4g")
    if run["headline"]:
        best += f" ({run['headline']})"
    git = f"{str(run['git'])[:8]}{'+' if run['dirty'] else ''}" if run["git"] else "-"
    return [
        run["run"],
        run["state"],
        f"{number(run['step'], 'd')}/{number(run['steps'], 'd')}",
        best,
        number(run["loss"], ".4g"),
        (run["started"] or "-")[:16].replace("T", " "),
        str(timedelta(seconds=round(run["seconds"]))) if run["seconds"] is not None else "-",
        git,
        number(run["goodput"], ".1%"),
    ]


def compare_runs(words: list[str]) -> int:
    """Runs `r1jax runs compare`.

    Args:
      words: The command line after it; the runs come first.

    Returns:
      The exit code.

    Raises:
      UserError: A folder is no run, or the picture cannot be written.
    """
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    line = [*(["--runs", *words[:count]] if count else []), *words[count:]]
    arguments = load_arguments(CompareArguments, line, "r1jax runs compare", COMPARE_HELP)
    if not arguments.runs:
        raise UserError("no runs was named; add RUN RUN ..., for example: r1jax runs compare runs/a runs/b")
    for name in arguments.runs:
        path = Path(name)
        told = f"{name} does not exist" if not path.is_dir() else foreign(path)
        if told is not None:
            raise UserError(f"{name}: {told}: give the folder of a run, for example runs/medical")
    runs = [read_run(Path(name)) for name in arguments.runs]
    found = compare(runs)
    if arguments.output is not None:
        write_picture(Path(arguments.output), runs, found)
    if arguments.json:
        print(json.dumps(found._asdict(), indent=1))
    else:
        _show_comparison(found)
    if arguments.output is not None:
        print(f"curves: {arguments.output}", file=sys.stderr)
    return 0


def _show_comparison(found: Comparison) -> None:
    for title, rows in found.tables().items():
        print(f"{title}{'' if rows else ': no difference'}")
        if rows:
            show(("", *found.runs), [[name, *map(_text, values)] for name, values in rows.items()])
        print()
    for line in found.problems:
        print(line)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def show(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """Prints a table: drawn on a terminal, plain columns into a pipe.

    Args:
      columns: Their headings.
      rows: A cell for each.
    """
    console = Console()
    if console.is_terminal:
        table = Table(*columns)
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
