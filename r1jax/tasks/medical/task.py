"""The medical task: from a case to inputs, loss, predictions and figures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from r1jax.config import Config
from r1jax.data.compose import Mixed
from r1jax.data.folder import FolderCases
from r1jax.data.pipeline import Preprocessed, open_pipeline, parts
from r1jax.data.source import Source
from r1jax.data.synthetic import SyntheticCases
from r1jax.data.tokenizer import check_vocabulary
from r1jax.errors import UserError, nearest
from r1jax.models.r1 import Inputs, Output
from r1jax.tasks.medical import batch as b
from r1jax.tasks.medical.closing import findings_table
from r1jax.tasks.medical.figures import OPERATING_SPECIFICITY
from r1jax.tasks.medical.loss import loss_weights, predictions, total_loss
from r1jax.tasks.medical.modes import MODES, best_attainable, shown_modes
from r1jax.tasks.medical.schema import FINDING, FINDINGS
from r1jax.tasks.metrics import operating_point, quadratic_kappa, roc_auc
from r1jax.tasks.task import Figures


class Medical:
    """What a case is, which heads it needs, how outputs become loss, predictions and a score (a `Task`)."""

    unit = "cases"

    def __init__(self, config: Config) -> None:
        """Checks the fields against the schema.

        Args:
          config: Model, task and data.

        Raises:
          UserError: An unknown finding or preprocessor, or a vocabulary that is too small for the tokenizer.
        """
        names = config.task.fields or tuple(finding.name for finding in FINDINGS)
        for name in names:
            if name not in FINDING:
                raise UserError(f"task.fields names {name!r}, which is no finding{nearest(name, FINDING)}")
        if "text" in config.model.modalities:
            check_vocabulary(config.model.decoder.vocab_size)
        self.config = config
        self.pipeline = open_pipeline(config.data.preprocess, config.data.plugins)
        self.fields = names
        self.heads = tuple((name, FINDING[name].width) for name in names)
        self._opened: dict[str, FolderCases] = {}  # once each: the parts share its memory and its cache
        self.language = "text" in config.model.modalities and config.task.text_weight > 0

    def source(self, split: str) -> Source:
        """Opens the cases of `train`, `val`, `test` or `all`.

        Raises:
          UserError: The folder does not give what the model reads.
        """
        data = self.config.data
        if data.path is None:
            sizes = {"train": data.train_cases, "val": data.val_cases, "test": data.test_cases}
            if split not in sizes:
                raise UserError(f"data.split is {split!r}, but the synthetic data has {', '.join(sizes)}")
            source = SyntheticCases(data.seed, sizes[split], split, self.config.model.volume.size)
        else:
            source = self._part(data.path, split)
            if split == "train" and data.mix:
                source = Mixed([source, *(self._part(path, split) for path in data.mix)], data.weights)
        if self.pipeline.steps:
            if split == "train":
                self.pipeline.fit(source)
            source = Preprocessed(source, self.pipeline, data.seed)
        given, read = source.schema.modalities, self.config.model.modalities
        if not given & set(read):
            raise UserError(
                f"{data.path or 'the synthetic data'} has {', '.join(sorted(given))}, but the model reads "
                f"{', '.join(read)}: choose a config or checkpoint for this kind of data"
            )
        return source

    def _part(self, path: str, split: str) -> FolderCases:
        data = self.config.data
        if path not in self._opened:
            self._opened[path] = FolderCases.open(path, cache=data.cache)
        return self._opened[path].part(split, data.fold, data.folds, data.seed)

    def remarks(self, source: Source) -> list[str]:
        """Findings to learn of which no training case knows the answer.

        Raises:
          UserError: That is all of them.
        """
        folders = [part for part in parts(source) if isinstance(part, FolderCases)]
        if not folders:
            return []
        known = frozenset[str]().union(*(folder.known_findings() for folder in folders))
        unknown = [name for name in self.fields if name not in known]
        if len(unknown) == len(self.fields):
            has = ", ".join(finding.name for finding in FINDINGS if finding.name in known)
            mend = f"choose from what is known there ({has}) with --task.fields, or " if has else ""
            where = " and ".join([str(self.config.data.path), *self.config.data.mix])
            raise UserError(
                f"{where} has no training case with a known {' or '.join(unknown)}: {mend}add the "
                "answers to the folder (docs/data.md)"
            )
        return [f"note: no training case knows {', '.join(unknown)}: not learned"] if unknown else []

    def collate(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """Turns a source's batch into a flat dict of arrays."""
        return b.collate(raw, self.config, self.fields)

    def prepare(
        self, batch: dict[str, Array], keys: Key[Array, " B"] | None = None
    ) -> tuple[Inputs, dict[str, Float[Array, "B ..."]]]:
        """Windows, crops and, with keys, augments a batch and hides modalities; runs on the device.

        Args:
          batch: From `collate`.
          keys: A key for each case, of its randomness in training; None at evaluation.

        Returns:
          What the model reads, and the targets, with centres counted from the middle of the volume that it reads.
        """
        config, targets = self.config, {k.removeprefix("target."): v for k, v in batch.items() if "target." in k}
        arrays = {k: v for k, v in batch.items() if "target." not in k}
        zoom = None  # one for all pictures of a case
        for name in b.PICTURES:
            if name in arrays:
                x, spacing = b.window(arrays[name]), arrays[f"{name}_spacing"]
                if keys is not None and config.task.augment != "none":
                    own = b.fold_in(keys, b.PICTURES.index(name))
                    x, spacing, targets, zoom = b.augment(own, x, spacing, targets, config.task.augment, zoom)
                arrays[name], arrays[f"{name}_spacing"] = b.fit(x, getattr(config.model, name).size), spacing
        targets = self.recentre(targets, batch | {"volume_spacing": arrays.get("volume_spacing")}, 1)
        inputs = Inputs(**arrays)
        if keys is not None and config.task.modality_dropout > 0:
            both = b.has_pictures(inputs) & b.has_record(inputs)
            draw = b.uniform(b.fold_in(keys, len(b.PICTURES)))
            rate = config.task.modality_dropout
            inputs = b.hide(inputs, both & (draw < rate), both & (draw > 1 - rate))
        return inputs, targets

    def recentre(self, found: dict[str, Array], batch: dict[str, Array], sign: int) -> dict[str, Array]:
        """Moves centres between the middle of the volume that was given and that of the volume that the model reads.

        Cutting 51 voxels to 48 cannot keep the middle: the two lie half a voxel apart.

        Args:
          found: Targets or predictions.
          batch: From `collate`, in the orientation of the centres.
          sign: 1 counts from what is read instead of what was given, -1 undoes that.

        Returns:
          The same with the centres moved, if there are any.
        """
        if "volume" not in batch or "center_mm" not in found:
            return found
        moved = b.fitted_middle(batch["volume"].shape[1:], self.config.model.volume.size)
        if not any(moved):
            return found
        return found | {"center_mm": found["center_mm"] + sign * jnp.asarray(moved)[None] * batch["volume_spacing"]}

    def weights(self, inputs: Inputs, targets: dict[str, Float[Array, "B ..."]]) -> dict[str, Float[Array, ""]]:
        """Over how much each mean of the loss is taken in these cases; arguments as in `Task`."""
        return loss_weights(inputs, targets)

    def loss(
        self,
        output: Output,
        inputs: Inputs,
        targets: dict[str, Float[Array, "B ..."]],
        share: Float[Array, ""],
        weights: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Scalar loss and its parts; arguments as in `Task`."""
        return total_loss(output, inputs, targets, self.config.task, share, weights)

    def show(self, inputs: Inputs, mode: dict[str, Bool[Array, ""]]) -> Inputs:
        """Hides what the mode (an entry of `MODES`) does not show."""
        if len(self.modes()) == 1:
            return inputs
        everyone = jnp.ones_like(b.has_pictures(inputs))
        return b.hide(inputs, everyone & mode["hide_images"], everyone & mode["hide_record"])

    def modes(self) -> dict[str, dict[str, bool]]:
        """What can be shown: with pictures and a record, also each alone."""
        reads, pictures = set(self.config.model.modalities), set(b.PICTURES)
        return MODES if reads & pictures and reads - pictures else {"both": MODES["both"]}

    def views(self, inputs: Inputs) -> list[tuple[Inputs, Any]]:
        """The orientations to average at evaluation, each with what turns an offset back."""
        result = []
        shapes = [x.shape for x in (getattr(inputs, name) for name in b.PICTURES) if x is not None]
        square = all(shape[-1] == shape[-2] for shape in shapes)  # others cannot be transposed, the views from 4 on
        for index in range(min(self.config.task.views, 8 if square else 4)):
            turned, undo = inputs, lambda vector: vector
            for name in b.PICTURES:
                x = getattr(inputs, name)
                if x is None:
                    continue
                flips, transpose = b.view_of(index, x.shape[0], x.ndim - 1)
                spacing = b.swap_in_plane(getattr(inputs, f"{name}_spacing"), transpose)
                turned = turned._replace(**{name: b.orient(x, flips, transpose), f"{name}_spacing": spacing})
                if name == "volume":
                    undo = lambda vector, f=flips, t=transpose: b.unorient_vector(vector, f, t)  # noqa: E731
            result.append((turned, undo))
        return result

    def outcomes(
        self, read: Callable[..., Output], batch: dict[str, Array], mode: dict[str, Bool[Array, ""]]
    ) -> dict[str, Array]:
        """Predictions of what the mode shows, averaged over the views.

        Args:
          read: The model with its weights.
          batch: From `collate`.
          mode: An entry of `MODES`.

        Returns:
          As `predict`.
        """
        inputs, _ = self.prepare(batch)
        views = []
        for turned, undo in self.views(self.show(inputs, mode)):
            found = self.predict(read(turned).heads)
            if "center_mm" in found:
                found["center_mm"] = undo(found["center_mm"])
            views.append(found)
        return self.recentre(jax.tree.map(lambda *same: sum(same) / len(same), *views), batch, -1)

    def predict(self, heads: dict[str, Float[Array, "B _"]]) -> dict[str, Array]:
        """Probabilities and millimetres from raw head outputs."""
        return predictions(heads)

    def figures(self, predicted: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> dict[str, float]:
        """Cheap figures for the validation during training.

        Args:
          predicted: From `predict`, all cases.
          targets: Findings, NaN where unknown.

        Returns:
          `auc.<finding>` and `kappa.<finding>`.
        """
        figures: dict[str, float] = {}
        for name in self.fields:
            target, kind = targets[name], FINDING[name].kind
            if kind not in ("binary", "rating"):
                continue
            known = ~np.isnan(target)
            if kind == "binary" and 0 < target[known].sum() < known.sum():
                figures[f"auc.{name}"] = float(roc_auc(target[known], predicted[name][known]))
            elif kind == "rating" and np.unique(target[known]).size > 1:
                levels = np.argmax(predicted[name][known], axis=1) + 1
                figures[f"kappa.{name}"] = float(quadratic_kappa(target[known], levels))
        return figures

    def operating_points(
        self, predicted: dict[str, np.ndarray], targets: dict[str, np.ndarray]
    ) -> dict[str, dict[str, float]]:
        """Threshold of each binary finding for the specificity `OPERATING_SPECIFICITY`, and what it reaches here.

        Args:
          predicted: From `predict`, all validation cases.
          targets: Findings, NaN where unknown.

        Returns:
          By finding: threshold, sensitivity, specificity, n_positive, n_negative; without findings of one class only.
        """
        points = {}
        for name in self.fields:
            target = targets[name]
            known = ~np.isnan(target) if FINDING[name].kind == "binary" else np.zeros(0, bool)
            positive = int(target[known].sum()) if known.any() else 0
            if 0 < positive < known.sum():
                point = operating_point(target[known], predicted[name][known], OPERATING_SPECIFICITY)
                counts = {"n_positive": positive, "n_negative": int(known.sum()) - positive}
                points[name] = point._asdict() | counts
        return points

    def score(self, figures: Figures) -> float | None:
        """Mean AUC, or mean kappa where no finding is binary; None where nothing can be judged."""
        judged = [v for k, v in figures.items() if k.startswith("auc.")] or list(figures.values())
        return float(np.mean(judged)) if judged else None

    def headline(self, figures: Figures) -> str:
        """Score and AUCs."""
        score, aucs = self.score(figures), [f"{k} {v:.3f}" for k, v in figures.items() if k.startswith("auc")]
        return "  ".join([f"score {score:.3f}" if score is not None else "no case can be judged", *aucs])

    def closing(self, figures: dict[str, Figures], source: Source, cases: int) -> str:
        """Findings as rows, what the model was shown as columns."""
        shown = shown_modes(self.config.model.modalities, source.schema.modalities)
        return findings_table(figures, shown, best_attainable(source))
