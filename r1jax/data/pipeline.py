"""Pipelines of preprocessors, written as `text_clean|window(-1000, 400)`, and sources that pass through one."""

import ast
import hashlib
import inspect
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from r1jax.data.plugins import Case, Preprocessor, find_preprocessor
from r1jax.data.schema import Field, Schema
from r1jax.data.source import Source
from r1jax.errors import UserError

STEP = re.compile(r"\s*([A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*(\(.*\))?\s*", re.DOTALL)
CHUNK = 64
"""Cases that are read at once to fit a preprocessor."""


class Step(NamedTuple):
    """A preprocessor of a pipeline with its arguments."""

    text: str
    run: Preprocessor
    file: str
    made: str
    """sha256 of the plug-in's file, or the version of a built-in preprocessor."""

    def refuse(self, what: str, case: Case | None = None) -> UserError:
        """An error that names the preprocessor, its file and the case."""
        where = f" of case {case['case_id']!r}" if case is not None and "case_id" in case else ""
        return UserError(f"preprocessor {self.text} ({self.file}){where} {what}")


class Pipeline:
    """Preprocessors in turn; without any, cases pass as they are."""

    def __init__(self, steps: Sequence[Step] = ()) -> None:
        """Takes the steps.

        Args:
          steps: From `open_pipeline`.
        """
        self.steps = tuple(steps)

    def provenance(self) -> dict[str, Any]:
        """What decides the results; JSON-able. A checkpoint keeps it."""
        return {
            "steps": [{"step": s.text, "file": Path(s.file).name, "made": s.made} for s in self.steps],
            "statistics": {str(i): s.run.statistics for i, s in enumerate(self.steps) if s.run.fitted},
        }

    def restore(self, stored: dict[str, Any]) -> list[str]:
        """Takes over the statistics that a training run has found.

        Args:
          stored: What `provenance` gave then.

        Returns:
          A line for each preprocessor that was another one then.
        """
        for i, statistics in stored["statistics"].items():
            if int(i) < len(self.steps):
                self.steps[int(i)].run.statistics = statistics
        return changed(stored, self.provenance())

    def fit(self, source: Source) -> None:
        """Lets preprocessors look at the training cases, those that have no statistics yet.

        Args:
          source: The training cases, as they are before the pipeline.

        Raises:
          UserError: A preprocessor fails.
        """
        for i, step in enumerate(self.steps):
            if step.run.fitted and step.run.statistics is None:
                before = Preprocessed(source, Pipeline(self.steps[:i]), 0)
                try:
                    step.run.statistics = json.loads(json.dumps(step.run.fit(_cases(before))))
                except UserError:
                    raise
                except Exception as error:
                    raise step.refuse(f"cannot be fitted: {type(error).__name__}: {error}") from error

    def documents(self, texts: Iterable[str]) -> Iterator[str]:
        """Passes plain texts through the pipeline, before they are tokenized and packed.

        Args:
          texts: Documents.

        Yields:
          The processed documents.

        Raises:
          UserError: A preprocessor is random, needs statistics, or gives no text.
        """
        schema = Schema((Field("text", "text"),))
        schemas = [schema, *self.schemas(schema)]
        for step in self.steps:
            if step.run.fitted or not step.run.deterministic:
                raise step.refuse("is random or fitted, but text is packed once for the whole run: leave it out")
        for text in texts:
            yield self.run({"text": text}, schemas, None)["text"]

    def schemas(self, schema: Schema) -> list[Schema]:
        """Fields after each step.

        Args:
          schema: Fields before the first.

        Returns:
          One schema a step.

        Raises:
          UserError: A step does not fit what comes to it.
        """
        found = []
        for step in self.steps:
            kinds = {field.kind for field in schema.fields}
            if step.run.modality and step.run.modality not in kinds:
                raise step.refuse(f"reads {step.run.modality}, but what comes to it has {', '.join(sorted(kinds))}")
            try:
                schema = step.run.output(schema)
            except UserError as error:
                raise step.refuse(f"does not fit: {error}") from error
            if not isinstance(schema, Schema):
                raise step.refuse(f"gives {type(schema).__name__} as its output, not a Schema")
            found.append(schema)
        return found

    def run(self, case: Case, schemas: Sequence[Schema], seeds: Sequence[int] | None) -> Case:
        """Passes one case through all steps.

        Args:
          case: Before the first.
          schemas: Fields before the first step and after each.
          seeds: Seed of the random steps; None in evaluation.

        Returns:
          The case after the last step.

        Raises:
          UserError: A step fails, or gives something else than it declares.
        """
        for i, step in enumerate(self.steps):
            given = dict(case)
            more: tuple[Any, ...] = ()
            if not step.run.deterministic:
                more = (None if seeds is None else np.random.default_rng((*seeds, i)),)
            try:
                result = step.run.process(given, *more)
            except UserError as error:
                raise step.refuse(f"failed: {error}", case) from error
            except Exception as error:
                raise step.refuse(f"failed: {type(error).__name__}: {error}", case) from error
            case = _checked(step, case, result, schemas[i + 1])
        return case


class Preprocessed:
    """A source whose cases have passed through a pipeline (a `Source`)."""

    def __init__(self, source: Source, pipeline: Pipeline, seed: int) -> None:
        """Puts a pipeline behind a source.

        Args:
          source: The cases.
          pipeline: Fitted, where it must be.
          seed: Of random preprocessors.

        Raises:
          UserError: A step does not fit the source, or has seen no training cases.
        """
        for step in pipeline.steps:
            if step.run.fitted and step.run.statistics is None:
                raise step.refuse("is fitted on the training part alone, which was not opened")
        self.source, self.pipeline, self.seed = source, pipeline, seed
        self._schemas = [source.schema, *pipeline.schemas(source.schema)]
        self.schema = self._schemas[-1]
        self.name = f"{source.name}, through {'|'.join(step.text for step in pipeline.steps)}"
        made = json.dumps([source.fingerprint, pipeline.provenance()], sort_keys=True)
        self.fingerprint = hashlib.sha256(made.encode()).hexdigest()
        self.starts, self.weights = (getattr(source, name, None) for name in ("starts", "weights"))
        self.sources = getattr(source, "sources", None)

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.source)

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        """Reads cases for evaluation: random preprocessors are told so."""
        return self._read(indices, None)

    def read_training_batch(self, indices: Int[np.ndarray, " B"], k: int) -> dict[str, Any]:
        """Reads cases of a training batch.

        Args:
          indices: Which cases.
          k: Number of the batch; with the seed and the index of a case it decides what random preprocessors do.

        Returns:
          As `Source.read_batch` gives it, in the fields of `schema`.
        """
        return self._read(indices, k)

    def prefetch(self, indices: Int[np.ndarray, " B"]) -> None:
        """Tells the source beneath what will be read, where it wants to know."""
        getattr(self.source, "prefetch", lambda _: None)(indices)

    def counters(self) -> dict[str, float]:
        """What the source beneath has counted."""
        return getattr(self.source, "counters", dict)()

    def _read(self, indices: Int[np.ndarray, " B"], k: int | None) -> dict[str, Any]:
        raw = self.source.read_batch(indices)
        cases = []
        for row, index in enumerate(indices):
            case = {name: _shielded(values[row]) for name, values in raw.items()}
            seeds = None if k is None else (self.seed, k, int(index))
            cases.append(self.pipeline.run(case, self._schemas, seeds))
        return {name: _stacked(name, [case[name] for case in cases], self.schema, raw) for name in cases[0]}


def original(source: Source) -> Source:
    """The source beneath a pipeline, or the source itself."""
    return source.source if isinstance(source, Preprocessed) else source


def changed(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compares what `Pipeline.provenance` gave at two times; a line for each step whose code or text differs."""
    before, after = stored["steps"], now["steps"]
    if len(before) != len(after):
        return [f"data.preprocess had {len(before)} steps, and has {len(after)} now"]
    return [
        f"{new['step']} ({new['file']}) is not the code of then: its hash was {old['made'][:12]}, and is "
        f"{new['made'][:12]} now"
        for old, new in zip(before, after, strict=True)
        if (old["step"], old["made"]) != (new["step"], new["made"])
    ]


def open_pipeline(text: str, folders: Sequence[str] = ()) -> Pipeline:
    """Reads a pipeline; arguments are literals, and nothing in the text is ever executed.

    Args:
      text: Steps separated by `|`, each a name with arguments in brackets if it takes some; "" is no step.
      folders: Folders of plug-ins.

    Returns:
      The pipeline.

    Raises:
      UserError: The text cannot be read, there is no such preprocessor, or it does not take these arguments.
    """
    return Pipeline([_step(part, folders) for part in _split(text)] if text.strip() else ())


def _split(text: str) -> list[str]:
    """Cuts at every `|` outside of brackets and strings."""
    parts, depth, begin = [], 0, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.replace("\n", " ")).readline):
            depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
            if token.type == tokenize.OP and token.string == "|" and not depth:
                parts.append(text[begin : token.start[1]])
                begin = token.end[1]
    except (tokenize.TokenError, SyntaxError) as error:
        raise UserError(f"data.preprocess {text!r} cannot be read: close its brackets and quotes") from error
    return [*parts, text[begin:]]


def _step(text: str, folders: Sequence[str]) -> Step:
    match = STEP.fullmatch(text)
    if match is None:
        raise UserError(f"data.preprocess: {text.strip()!r} is no step: write NAME or NAME(ARGUMENTS), separated by |")
    name, bracket = match.groups()
    try:
        call = ast.parse(f"_{bracket or '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("more than one pair of brackets")
        positional = [ast.literal_eval(value) for value in call.args]
        named = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    except (SyntaxError, ValueError, TypeError) as error:
        raise UserError(
            f"data.preprocess: the arguments of {text.strip()!r} must be plain numbers, strings or lists ({error})"
        ) from error
    found = find_preprocessor(name, folders)
    try:
        run = found.kind(*positional, **named)
    except UserError as error:
        raise UserError(f"data.preprocess: {text.strip()}: {error}") from error
    except Exception as error:
        raise UserError(
            f"data.preprocess: {text.strip()!r} ({found.file}) takes {name}{inspect.signature(found.kind)}: {error}"
        ) from error
    words = [repr(value) for value in positional] + [f"{key}={value!r}" for key, value in named.items()]
    made = found.sha256 or f"r1jax {found.kind.version}"
    return Step(name + (f"({', '.join(words)})" if words else ""), run, found.file, made)


def _cases(source: "Preprocessed") -> Iterator[Case]:
    for first in range(0, len(source), CHUNK):
        raw = source.read_batch(np.arange(first, min(first + CHUNK, len(source))))
        for row in range(len(next(iter(raw.values())))):
            yield {name: _shielded(values[row]) for name, values in raw.items()}


def _shielded(value: Any) -> Any:
    """An array that cannot be written into: it may be the source's own memory."""
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    return value


def _checked(step: Step, before: Case, after: Any, schema: Schema) -> Case:
    """Holds what a step gave to what it declares; values that it left alone are as the source gave them."""
    if not isinstance(after, dict):
        raise step.refuse(f"gives {type(after).__name__}, not the case as a dict", before)
    fields = {field.name: field for field in schema.fields}
    missing = [name for name in fields if name not in after]
    if missing:
        raise step.refuse(f"gives no {missing[0]!r}: return it, or leave it out of `output`", before)
    for name, value in after.items():
        if name in before and value is before[name]:
            continue
        if name not in fields and name not in before:
            raise step.refuse(f"gives {name!r}, which is no field: add it in `output`", before)
        if name in fields and not _fits(value, fields[name]):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
            raise step.refuse(f"gives {got} as {name!r}, where {_declared(fields[name])} is declared", before)
    return after


def _declared(field: Field) -> str:
    if not field.dtype:
        return "bytes" if field.kind == "bytes" else "a string"
    return f"{field.dtype} {['any' if size is None else size for size in field.shape]}"


def _fits(value: Any, field: Field) -> bool:
    if not field.dtype:
        return isinstance(value, bytes | None if field.kind == "bytes" else str)
    if value is None:
        return None in field.shape
    if not field.shape:
        return np.ndim(value) == 0 and np.can_cast(np.asarray(value).dtype, field.dtype, "same_kind")
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.dtype(field.dtype)
        and value.ndim == len(field.shape)
        and all(want in (None, size) for want, size in zip(field.shape, value.shape, strict=True))
    )


def _stacked(name: str, values: list[Any], schema: Schema, raw: dict[str, Any]) -> Any:
    """Puts the values of a batch together as a source does."""
    field = next((field for field in schema.fields if field.name == name), None)
    if field is None:  # something beside the schema, of which the source knows the form
        return values if isinstance(raw[name], list) else np.stack(values)
    if not field.dtype or None in field.shape:
        return values
    if field.shape:
        return np.stack(values)
    column = np.array(values)  # whole numbers with a missing value are floats
    return column if column.dtype.kind == "f" != np.dtype(field.dtype).kind else column.astype(field.dtype)
