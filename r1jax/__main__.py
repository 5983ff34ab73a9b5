"""The command `r1jax` (or `python -m r1jax`): everything but training and scoring, one subcommand each."""

import importlib
from typing import NamedTuple

from r1jax.errors import UserError, nearest, run_main
from r1jax.huge_pages import start_with_huge_pages


class Command(NamedTuple):
    """A subcommand; its module is imported when it is called."""

    module: str
    function: str
    """Takes the words after the subcommand's name and returns the exit code."""
    summary: str


COMMANDS = {
    "data convert": Command("r1jax.serve.data_command", "convert", "cases, pictures, tables ... -> Parquet files"),
    "data info": Command("r1jax.serve.data_command", "info", "describes Parquet files below a path or URL"),
    "data stats": Command("r1jax.serve.cache_stats", "stats_command", "what a cache of rows holds, and its hits"),
    "data verify": Command("r1jax.serve.data_command", "verify", "compares Parquet files with their checksums"),
    "export": Command("r1jax.serve.export_command", "export", "checkpoint -> a model that runs without r1jax"),
    "generate": Command(
        "r1jax.serve.generate_command", "generate", "text from a checkpoint, Hugging Face's or r1jax's"
    ),
    "hf import": Command("r1jax.serve.huggingface", "import_folder", "Hugging Face checkpoint -> r1jax checkpoint"),
    "hf export": Command("r1jax.serve.huggingface", "export_folder", "r1jax checkpoint -> Hugging Face checkpoint"),
    "hf logits": Command("r1jax.serve.huggingface", "write_logits", "next-token logits of a Hugging Face checkpoint"),
    "hf verify": Command("r1jax.serve.huggingface", "verify_folder", "compares a checkpoint with its reference"),
    "monitor": Command("r1jax.serve.monitor", "monitor", "how far a later period has drifted from an evaluated one"),
    "quantize": Command("r1jax.serve.quantize_command", "quantize_checkpoint", "checkpoint -> few bits, and a report"),
    "runs list": Command("r1jax.serve.runs_command", "list_runs", "all runs below a folder, and how they stand"),
    "runs compare": Command("r1jax.serve.runs_command", "compare_runs", "where runs differ, and their curves"),
    "score": Command("r1jax.serve.score_command", "score", "payments row by row -> their risk, as they come in"),
}


def dispatch(words: list[str]) -> int:
    """Runs the subcommand that the first one or two words name.

    Args:
      words: The command line after the program's name.

    Returns:
      The exit code.

    Raises:
      UserError: There is no such subcommand, or what it is told is wrong.
    """
    for count in (2, 1):
        command = COMMANDS.get(" ".join(words[:count]))
        if command is not None and len(words) >= count:
            return getattr(importlib.import_module(command.module), command.function)(words[count:])
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else None
    asked = words[1:] if group else words
    if not asked or asked[0] in ("--help", "-h"):
        print(listing(group))
        return 0
    name = f"{group} {asked[0]}" if group else asked[0]
    raise UserError(f"r1jax has no command {name!r}{nearest(name, COMMANDS)}; r1jax --help lists all.")


def listing(group: str | None) -> str:
    """Lists subcommands.

    Args:
      group: Only those that start with this word; None lists all.

    Returns:
      One line each.
    """
    shown = {name: c.summary for name, c in COMMANDS.items() if group is None or name.split()[0] == group}
    lines = [f"  r1jax {name:10}  {summary}" for name, summary in shown.items()]
    return "\n".join(["usage: r1jax COMMAND ...; r1jax COMMAND --help tells more.", "", *lines])


def main() -> None:
    """Entry point of the console script."""
    start_with_huge_pages()
    run_main(dispatch)


if __name__ == "__main__":
    main()
