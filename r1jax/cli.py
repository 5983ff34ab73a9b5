"""The only place that parses a command line: flags in front of a config file, typed by the config's own fields."""

import contextlib
import dataclasses
import inspect
import io
import re
import sys
import traceback
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_origin

import tyro

from r1jax.config import Config, from_dict
from r1jax.errors import UserError, nearest
from r1jax.fields import build, fit, leaves, to_dict, to_json, wanted
from r1jax.validation import validate

TRAIN_HELP = """\
Trains the model that a config file describes; the same command again goes on from the last checkpoint.

  --config FILE.py[:VARIANT,...]  the experiment; a variant is an argument of the file's get_config()
  --FIELD VALUE                   replaces one field of it, anywhere on the line; all fields are listed below
  --quant int8                    short for --model.quant: trains with products of rounded numbers
  --print-config                  prints the resolved config as JSON and leaves
  --dry-run                       compiles the step, prints parameters, FLOPs, memory, what devices exchange, and leaves
  --mesh.show                     prints where each weight lies on the mesh, on devices that need not exist, and leaves
  --profile                       traces 5 steps into WORKDIR/profile and prints their costliest operations

Examples:
  python train.py --config configs/medical.py
  python train.py --config configs/medical.py:smoke --train.steps 200 --model.volume.size 32 32 32
"""
T = TypeVar("T")
SWITCHES = ("--config", "--print-config", "--dry-run", "--mesh.show", "--profile", "--help")


@dataclass(frozen=True)
class Invocation:
    """What train.py was asked to do."""

    config: Config
    mode: Literal["run", "dry-run", "show"]


def load_config(arguments: list[str]) -> Invocation:
    """Reads the command line of train.py; prints and leaves for `--help` and `--print-config`.

    Args:
      arguments: Words after the program's name.

    Returns:
      The resolved and validated config, and whether to run it, only to compile it, or only to show its mesh.

    Raises:
      UserError: A flag, a variant, a value or the config file is wrong.
      SystemExit: `--help` and `--print-config`, with code 0.
    """
    flags, stray = _flags(arguments)
    if stray:
        hint = "did you mean --config?" if ".py" in stray[0] else "flags start with --."
        raise UserError(f"unexpected argument {stray[0]!r}; {hint}")
    asked_help, print_config = (_switch(flags, name) for name in ("help", "print_config"))
    dry_run, show = (_switch(flags, name) for name in ("dry_run", "mesh.show"))
    if _switch(flags, "profile"):
        flags.setdefault("profile.steps", ["5"])
    if "quant" in flags:
        flags["model.quant"] = flags.pop("quant")
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
    return Invocation(config, "show" if show else "dry-run" if dry_run else "run")


def load_arguments(
    kind: type[T], arguments: list[str], program: str, description: str, positional: tuple[str, ...] = ()
) -> T:
    """Reads the command line of anything but train.py; prints and leaves for `--help`.

    Args:
      kind: Frozen dataclass of the arguments; a field without default is a text that must be given.
      arguments: Words after the program's name.
      program: Its name, as the user writes it.
      description: What it does, with at least one line after `Examples:`.
      positional: Fields that words without a flag fill, in this order; their flags work too.

    Returns:
      The arguments; names of files are as the user wrote them and need not exist.

    Raises:
      UserError: A flag or a value is wrong, or one that must be given is missing.
      SystemExit: `--help`, with code 0.
    """
    hints = leaves(kind)
    flags, words = _flags(
        arguments, {n for n, hint in hints.items() if get_origin(hint) is not tuple and hint is not bool}
    )
    required = [item.name for item in dataclasses.fields(kind) if _is_required(item)]
    defaults = kind(**dict.fromkeys(required, ""))
    if _switch(flags, "help"):
        _help(program, defaults, description)
    free = [name for name in positional if name not in flags]
    if len(words) > len(free):
        raise UserError(f"unexpected argument {words[len(free)]!r}; flags start with --.")
    values = to_dict(defaults)
    _override(values, kind, flags | {name: [word] for name, word in zip(free, words, strict=False)}, ("--help",))
    for name in required:
        if not values[name]:
            add = name.upper() if name in positional else f"--{name.replace('_', '-')}"
            example = description.partition("Examples:")[2].split("\n")[1].strip()
            raise UserError(f"no {name.replace('_', ' ')} was named; add {add}, for example: {example}")
    return build(kind, values, program)


def _is_required(item: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


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


def _flags(arguments: list[str], scalars: Container[str] = ()) -> tuple[dict[str, list[str]], list[str]]:
    """Groups the words of a command line by flag (`-` and `_` are one); the last of repeated flags counts.

    The second result are the words that belong to no flag: those before the first, and those after the one word of a
    flag in `scalars`.
    """
    flags: dict[str, list[str]] = {}
    words: list[str] = []
    last, free = "", words
    for argument in arguments:
        flag = "--help" if argument == "-h" else argument
        if flag.startswith("--"):
            last, equals, value = flag[2:].partition("=")
            last = last.replace("-", "_")
            free = flags[last] = [value] if equals else []
        elif free is not words and free and last in scalars:
            words.append(argument)
        else:
            free.append(argument)
    return flags, words


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
