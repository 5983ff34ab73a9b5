"""Preprocessors: what a plug-in is, and how one is found by name (docs/plugins.md)."""

import abc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import cloudpickle

from r1jax.data import preprocess
from r1jax.data.schema import Schema
from r1jax.errors import UserError, nearest

GROUP = "r1jax.preprocessors"
"""Group of entry points by which installed packages offer preprocessors."""
PLUGIN_PATH = "R1JAX_PLUGIN_PATH"
"""Environment variable with folders of plug-ins, separated as in PATH."""
PACKAGE = "r1jax_plugins"
"""Modules of dropped-in files are named beneath this."""

Case = dict[str, Any]


class Preprocessor(abc.ABC):
    """Maps a case to a case; a plug-in is a subclass.

    The arguments of the subclass are those that a pipeline gives: `resize(224)`. It is called `snake_case` after its
    class, or `name`. It must be picklable, and must not write into the arrays of a case.
    """

    name: ClassVar[str] = ""
    """In pipelines; the class's own name in snake_case where empty."""
    modality: ClassVar[str] = ""
    """Kind of field (`r1jax.data.schema.Kind`) that a source must have; any source will do where empty."""
    deterministic: ClassVar[bool] = True
    """False: `process` takes a second argument, a `np.random.Generator` in training and None in evaluation."""
    fitted: ClassVar[bool] = False
    """True: `fit` is called once with the training cases, and `statistics` holds what it returned."""
    version: ClassVar[int] = 1
    """Raised by r1jax whenever one of its own gives other results; of plug-ins the file's hash counts."""
    statistics: dict[str, Any] | None = None

    @abc.abstractmethod
    def process(self, case: Case) -> Case:
        """Turns a case into another.

        Args:
          case: Value by name of the field: a string, a number, an array, bytes, or None where missing; "case_id" too.

        Returns:
          The case with what has changed; the argument may be changed (its arrays may not) and returned.
        """

    def output(self, schema: Schema) -> Schema:
        """Fields after `process`; to be overridden where a name, kind, dtype or shape changes.

        Args:
          schema: Fields before.

        Returns:
          The same fields.
        """
        return schema

    def fit(self, cases: Iterable[Case]) -> dict[str, Any]:
        """Finds what `process` needs to know of the training cases; only called where `fitted`.

        Args:
          cases: All training cases, as `process` will get them.

        Returns:
          JSON-able statistics, kept in every checkpoint.
        """
        raise NotImplementedError(f"{type(self).__name__} is fitted and must define fit")


class Found(NamedTuple):
    """A preprocessor's class, and where it came from."""

    kind: type[Preprocessor]
    file: str
    sha256: str | None
    """Of the file; None for those of r1jax itself, which have a version."""


def find_preprocessor(name: str, folders: Sequence[str] = ()) -> Found:
    """Finds a preprocessor: built in, installed, dropped into a folder, or by import path.

    Args:
      name: As a pipeline names it, or `package.module:Class`.
      folders: Folders of plug-ins beside those of R1JAX_PLUGIN_PATH.

    Returns:
      The class.

    Raises:
      UserError: There is none, several have this name, or the file that might define it cannot be imported.
    """
    if ":" in name:
        return _imported(name)
    found, broken = [], []
    for offered, origin in [*_built_in(), *_installed(broken, name), *_dropped(folders, broken)]:
        found.append((offered, origin))
    fitting = {origin.kind: origin for offered, origin in found if offered == name}
    if len(fitting) > 1:
        files = " and ".join(sorted(origin.file for origin in fitting.values()))
        raise UserError(f"preprocessor {name!r} is defined twice, in {files}: set another `name` in one of the classes")
    if fitting:
        return next(iter(fitting.values()))
    known = sorted({offered for offered, _ in found})
    reasons = "".join(f"; {reason}" for reason in broken)
    raise UserError(
        f"data.preprocess names {name!r}, which is no preprocessor{nearest(name, known)}: there are "
        f"{', '.join(known)}{reasons}"
    )


def name_of(kind: type[Preprocessor]) -> str:
    """Name of a preprocessor in pipelines: its `name`, or that of its class in snake_case."""
    return kind.__dict__.get("name") or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


def _defined(module: ModuleType) -> Iterator[type[Preprocessor]]:
    """Preprocessors that a module defines itself, in order of their names."""
    for _, kind in inspect.getmembers(module, inspect.isclass):
        own = issubclass(kind, Preprocessor) and kind.__module__ == module.__name__
        if own and not inspect.isabstract(kind):
            yield kind


def _built_in() -> Iterator[tuple[str, Found]]:
    for info in pkgutil.iter_modules(preprocess.__path__):
        module = importlib.import_module(f"{preprocess.__name__}.{info.name}")
        yield from ((name_of(kind), Found(kind, str(module.__file__), None)) for kind in _defined(module))


def _installed(broken: list[str], name: str) -> Iterator[tuple[str, Found]]:
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name != name:  # what is not used is not imported
            continue
        try:
            kind = entry.load()
        except Exception as error:
            broken.append(f"{entry.value}, which an installed package offers, cannot be imported ({_said(error)})")
            continue
        yield entry.name, _checked(kind, entry.value)


def _imported(path: str) -> Found:
    module, _, attribute = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UserError(f"data.preprocess names {path!r}, which cannot be imported ({_said(error)})") from error
    return _checked(kind, path)


def _checked(kind: Any, where: str) -> Found:
    if not (inspect.isclass(kind) and issubclass(kind, Preprocessor)) or inspect.isabstract(kind):
        raise UserError(f"{where} is no preprocessor: it must be a subclass of r1jax's Preprocessor with `process`")
    file = Path(inspect.getfile(kind))
    return Found(kind, str(file), hashlib.sha256(file.read_bytes()).hexdigest())


def _dropped(folders: Sequence[str], broken: list[str]) -> Iterator[tuple[str, Found]]:
    """Preprocessors of the files in folders; one that cannot be imported stops only those who need it."""
    beside = [folder for folder in os.environ.get(PLUGIN_PATH, "").split(os.pathsep) if folder]
    files = {}
    for folder in [*map(Path, folders), *map(Path, beside)]:
        if not folder.is_dir():
            broken.append(f"there is no folder {folder}, which data.plugins or {PLUGIN_PATH} names")
            continue
        files |= {path.resolve(): path for path in sorted(folder.glob("*.py")) if path.name[0] not in "._"}
    for path in files:
        try:
            module, digest = _load(path)
        except (Exception, SystemExit) as error:
            broken.append(f"{path} cannot be imported ({_said(error)})")
            continue
        yield from ((name_of(kind), Found(kind, str(path), digest)) for kind in _defined(module))


def _load(path: Path) -> tuple[ModuleType, str]:
    """Imports a file under a name that tells it from others and from earlier versions of itself."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = f"{PACKAGE}.{path.stem}_{hashlib.sha256(str(path).encode() + content).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)  # the very bytes that were hashed
        except BaseException:
            del sys.modules[name]
            raise
        cloudpickle.register_pickle_by_value(module)  # workers cannot import it by name
    return sys.modules[name], digest


def _said(error: BaseException) -> str:
    where = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}: {error}{where}"
