"""The only place that parses a command line: flags in front of a config file, typed by the config's own fields."""

import contextlib
import dataclasses
import inspect
import io
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import tyro

from r1jax.config import Config, EvalArguments, from_dict, validate
from r1jax.errors import UserError, nearest
from r1jax.fields import build, fit, leaves, to_dict, to_json, wanted

TRAIN_HELP = """\
Trains the model that a config file describes; the same command again goes on from the last checkpoint.

  --config FILE.py[:VARIANT,...]  the experiment; a variant is an argument of the file's get_config()
  --FIELD VALUE                   replaces one field of it, anywhere on the line; all fields are listed below
  --print-config                  prints the resolved config as JSON and leaves
  --dry-run                       compiles the step, prints parameters, FLOPs and memory per device, and leaves

Examples:
  python train.py --config configs/medical.py
  python train.py --config configs/medical.py:smoke --train.steps 200 --model.volume.size 32 32 32
"""
EVAL_HELP = """\
Scores a checkpoint: metrics.json, one HTML page and a structured report of every case.

Examples:
  python eval.py --checkpoint runs/medical
  python eval.py --checkpoint runs/medical --data.path my_cases --data.split all --output my_results
"""
SWITCHES = ("--config", "--print-config", "--dry-run", "--help")


@dataclass(frozen=True)
class Invocation:
    """What train.py was asked to do."""

    config: Config
    mode: Literal["run", "dry-run"]


def load_config(arguments: list[str]) -> Invocation:
    """Reads the command line of train.py; prints and leaves for `--help` and `--print-config`.

    Args:
      arguments: Words after the program's name.

    Returns:
      The resolved and validated config, and whether to run it or only to compile it.

    Raises:
      UserError: A flag, a variant, a value or the config file is wrong.
      SystemExit: `--help` and `--print-config`, with code 0.
    """
    flags = _flags(arguments)
    asked_help, print_config, dry_run = (_switch(flags, name) for name in ("help", "print_config", "dry_run"))
    words = flags.pop("config", None)
    if words is None and asked_help:
        _help("train.py", Config(), TRAIN_HELP)
    if words is None:
        raise UserError("no experiment was named; add --config FILE.py, for example --config configs/medical.py.")
    if len(words) != 1:
        raise UserError(f"--config takes one Python file, for example configs/medical.py, but got {' '.join(words)!r}.")
    config, variants = _read_file(words[0])
    if asked_help:
        listed = ", ".join(map(str, variants)) or "none"
        _help("train.py", config, f"{TRAIN_HELP}\nVariants of {words[0]}: {listed}\n")
    values = to_dict(config)
    _override(values, Config, flags, SWITCHES)
    config = from_dict(values)
    validate(config)
    if print_config:
        print(to_json(config), end="")
        sys.exit(0)
    return Invocation(config, "dry-run" if dry_run else "run")


def load_eval_arguments(arguments: list[str]) -> EvalArguments:
    """Reads the command line of eval.py; prints and leaves for `--help`.

    Args:
      arguments: Words after the program's name.

    Returns:
      The arguments; `checkpoint` is as the user wrote it and need not exist.

    Raises:
      UserError: A flag or a value is wrong, or `--checkpoint` is missing.
      SystemExit: `--help`, with code 0.
    """
    flags = _flags(arguments)
    defaults = EvalArguments(checkpoint="")
    if _switch(flags, "help"):
        _help("eval.py", defaults, EVAL_HELP)
    values = to_dict(defaults)
    _override(values, EvalArguments, flags, ("--help",))
    if not values["checkpoint"]:
        raise UserError("no checkpoint was named; add --checkpoint DIR, for example --checkpoint runs/medical.")
    return build(EvalArguments, values, "eval.py")


def parse(hint: Any, words: list[str], name: str) -> Any:
    """Turns words of a command line into the value of a field.

    Args:
      hint: Annotated type of the field.
      words: What followed the flag; a list may also be one word with commas (`32,32,32`).
      name: The flag, for error messages.

    Returns:
      The value, within the field's bounds.

    Raises:
      UserError: The words are no such value.
    """
    given = " ".join(words)
    if get_origin(hint) is tuple:
        words = words[0].strip("()[]").replace(",", " ").split() if len(words) == 1 else words
    elif hint is bool:
        words = [word.capitalize() for word in words] or ["True"]
    elif not words:
        raise UserError(f"{name} has no value; it must be {wanted(hint)}.")
    elif len(words) > 1:
        raise UserError(f"{name} takes one value, but got {given!r}.")
    if hint is str and words == ["None"]:  # tyro would take it as the text "None"
        raise UserError(f"{name} cannot be None; it must be {wanted(hint)}.")
    holder = dataclasses.make_dataclass("Holder", [("value", hint)])
    line = [f"--value={words[0]}"] if len(words) == 1 else ["--value", *words]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro explains itself in a box of several lines
            value = tyro.cli(
                holder, args=line, console_outputs=False, add_help=False, config=(tyro.conf.FlagConversionOff,)
            ).value
        return fit(hint, value)
    except (SystemExit, ValueError, OverflowError):
        raise UserError(f"{name} is {given!r}, but it must be {wanted(hint)}.") from None


def _flags(arguments: list[str]) -> dict[str, list[str]]:
    """Groups the words of a command line by flag (`-` and `_` are one); the last of repeated flags counts."""
    flags: dict[str, list[str]] = {}
    words: list[str] | None = None
    for argument in arguments:
        flag = "--help" if argument == "-h" else argument
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            words = flags[name.replace("-", "_")] = [value] if equals else []
        elif words is None:
            hint = "; did you mean --config?" if ".py" in argument else "; flags start with --."
            raise UserError(f"unexpected argument {argument!r}{hint}")
        else:
            words.append(argument)
    return flags


def _switch(flags: dict[str, list[str]], name: str) -> bool:
    """Takes a flag without value off the line and says whether it was there."""
    words = flags.pop(name, None)
    if words:
        raise UserError(f"--{name.replace('_', '-')} takes no value, but got {' '.join(words)!r}.")
    return words is not None


def _override(values: dict[str, Any], kind: type, flags: dict[str, list[str]], switches: Iterable[str]) -> None:
    """Writes each flag's value into the nested dicts of a config."""
    hints = leaves(kind)
    for name, words in flags.items():
        if name not in hints:
            raise UserError(_unknown(name, hints, switches))
        group = values
        *path, last = name.split(".")
        for part in path:
            group = group[part]
        group[last] = parse(hints[name], words, f"--{name}")


def _unknown(name: str, hints: dict[str, Any], switches: Iterable[str]) -> str:
    """Says that there is no such flag, and which one was probably meant."""
    inside = [option for option in hints if option.startswith(f"{name}.")]
    if inside:
        return f"--{name} is a group of fields; set one of them, for example --{inside[0]}."
    group, _, last = name.rpartition(".")
    siblings = [option.rpartition(".")[2] for option in hints if group and option.rpartition(".")[0] == group]
    if siblings:
        meant = nearest(last, siblings)
        meant = meant.replace("'", f"'--{group}.", 1) if meant else f"; {group} has {', '.join(siblings)}"
    else:
        same = [f"--{option}" for option in hints if option.rpartition(".")[2] == last]
        meant = nearest(f"--{name}", same, cutoff=0.0) or nearest(f"--{name}", [*switches, *(f"--{h}" for h in hints)])
    return f"unknown flag '--{name}'{meant or '; --help lists every field'}."


def _help(program: str, defaults: Any, description: str) -> NoReturn:
    """Prints every field with its default and docstring, and leaves."""
    tyro.cli(
        type(defaults),
        default=defaults,
        prog=program,
        description=description,
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    raise AssertionError("tyro leaves after printing its help")


def _read_file(text: str) -> tuple[Config, list[inspect.Parameter]]:
    """Runs `FILE.py[:VARIANT,...]`; returns its config and the variants that it knows."""
    match = re.fullmatch(r"(.*?\.py)(?::(.*))?", text, re.DOTALL)
    if match is None:
        raise UserError(
            f"--config is {text!r}, but it must be a Python file, with variants after a colon: FILE.py:smoke."
        )
    path, variants = match[1], match[2] or ""
    try:
        source = Path(path).read_bytes()
    except FileNotFoundError:
        others = (str(other) for other in Path(path).parent.glob("*.py"))
        raise UserError(f"the config file {path!r} does not exist{nearest(path, others)}.") from None
    except OSError as error:
        raise UserError(f"the config file {path!r} cannot be read: {error.strerror}.") from None
    space: dict[str, Any] = {"__name__": "r1jax_config_file", "__file__": path}
    with _blamed_on(path):
        exec(compile(source, path, "exec"), space)
    get_config = space.get("get_config")
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config; it must define one that returns an r1jax.config.Config.")
    with _blamed_on(path):
        parameters = inspect.signature(get_config, eval_str=True).parameters
        config = get_config(**_arguments(variants, parameters, path))
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config returned {config!r:.60}, but it must return an r1jax.config.Config.")
    return from_dict(to_dict(config), path), list(parameters.values())


@contextlib.contextmanager
def _blamed_on(path: str) -> Iterator[None]:
    """Turns whatever a config file raises into one sentence that names its line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, message = [error.lineno], error.msg
        else:
            message = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{where}: {message.rstrip('.')}.") from error


def _arguments(variants: str, parameters: Any, path: str) -> dict[str, Any]:
    """Parses `smoke,steps=200` by the signature of get_config."""
    chosen: dict[str, Any] = {}
    for item in filter(None, map(str.strip, variants.split(","))):
        name, equals, value = item.partition("=")
        name = name.replace("-", "_")
        if name not in parameters:
            known = ", ".join(parameters) or "none"
            raise UserError(f"{path} has no variant {name!r}{nearest(name, parameters)}; it has {known}.")
        hint = parameters[name].annotation
        if hint is inspect.Parameter.empty:
            hint = type(parameters[name].default)
        chosen[name] = parse(hint, [value] if equals else [], f"{path}: the variant {name}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in chosen:
            raise UserError(f"{path} needs a value of its variant {name!r}: --config {path}:{name}=VALUE.")
    return chosen
