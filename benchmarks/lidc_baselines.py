"""Simple baselines for the seven ratings of lidc_3d_134, by cross-validation on the folds that r1jax uses.

    python benchmarks/lidc_baselines.py --data DIR --output benchmarks/results/lidc_baselines.json

Features of two kinds: `image`, from the cube alone (grey values about the centre; size, shape and edge of what a
threshold leaves connected to the centre), and `mask`, the same with the reader's outline given, which no model that
reads the cube alone has. Folds are those of `FolderCases.open(fold=k, seed=s)`; predictions of the held-out folds are
pooled, figures taken over all cases. Fold seed 0 is the headline, with bootstrap intervals over cases; the other seeds
show how much the cut matters. The best of many baselines is chosen after the fact, which flatters the baselines.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from scipy import ndimage, stats
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1jax.data.folder import FolderCases  # noqa: E402
from r1jax.tasks.metrics import bootstrap, quadratic_kappas, rank, weighted_mean  # noqa: E402

RATINGS = ("texture", "margin", "spiculation", "lobulation", "sphericity", "subtlety", "malignancy_rating")
CONSTANTS = ("median", "majority")
LEVELS = 5
FOLDS = 5
THRESHOLDS = (-700.0, -500.0, -300.0, -100.0)
"""HU above which a voxel belongs to the blob; part-solid and ground-glass nodules need the low ones."""
RADII = (5.0, 9.0, 14.0, 20.0)
REACH = 22.0
"""Voxels from the centre beyond which the blob is cut, so that wall and vessels do not flood it."""


# ---- features -------------------------------------------------------------------------------------------------------


def grey_features(cube: np.ndarray, distance: np.ndarray) -> list[float]:
    """Mean, spread, percentiles and histogram of the HU in balls about the centre."""
    values = []
    for radius in RADII:
        ball = cube[distance <= radius]
        values += [ball.mean(), ball.std(), *np.percentile(ball, (5, 25, 50, 75, 95))]
        values += (np.histogram(ball, np.linspace(-1000, 400, 11))[0] / ball.size).tolist()
    return values


def blob_features(cube: np.ndarray, blob: np.ndarray, slope: np.ndarray) -> list[float]:
    """Size, shape, grey values and sharpness of the edge of one set of voxels."""
    voxels = int(blob.sum())
    if voxels < 8:
        return [0.0] * 20
    faces = sum(int((np.diff(np.pad(blob, 1).astype(np.int8), axis=axis) != 0).sum()) for axis in range(3))
    points = np.argwhere(blob).astype(float)
    axes = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(points.T))[::-1], 1e-6))
    radius = (3 * voxels / (4 * np.pi)) ** (1 / 3)
    extent = points.max(0) - points.min(0) + 1
    inside, rim = cube[blob], blob & ~ndimage.binary_erosion(blob)
    shell = ndimage.binary_dilation(blob, iterations=2) & ~blob
    to_middle = np.linalg.norm(points - points.mean(0), axis=1)
    around = cube[shell] if shell.any() else inside
    return [
        *(np.log(voxels), radius, faces / voxels ** (2 / 3), *axes, axes[1] / axes[0], axes[2] / axes[0]),
        *(voxels / extent.prod(), to_middle.max() / radius, to_middle.std() / radius),
        *(inside.mean(), inside.std(), *np.percentile(inside, (10, 50, 90))),
        *(slope[rim].mean(), slope[rim].std(), inside.mean() - around.mean(), around.std()),
    ]


def central_blob(cube: np.ndarray, threshold: float, distance: np.ndarray) -> np.ndarray:
    """Voxels above the threshold, opened, that are connected to the one nearest to the centre."""
    above = ndimage.binary_opening((cube > threshold) & (distance <= REACH))
    parts, count = ndimage.label(above)
    if not count:
        return above
    nearest = np.where(above, distance, np.inf).argmin()
    return parts == parts.ravel()[nearest]


def features(cubes: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Feature tables [n, columns] of both kinds; cubes are HU."""
    size = cubes.shape[1:]
    offsets = np.indices(size) - (np.array(size)[:, None, None, None] - 1) / 2
    distance = np.sqrt((offsets**2).sum(0))
    rows: dict[str, list[list[float]]] = {"image": [], "mask": []}
    for cube, mask in zip(cubes, masks, strict=True):
        slope = ndimage.gaussian_gradient_magnitude(cube, 1.0)
        grey = grey_features(cube, distance)
        blobs = [blob_features(cube, central_blob(cube, t, distance), slope) for t in THRESHOLDS]
        rows["image"].append(grey + [value for blob in blobs for value in blob])
        rows["mask"].append(grey + blob_features(cube, mask, slope))
    return {kind: np.array(table, dtype=np.float64) for kind, table in rows.items()}


# ---- baselines ------------------------------------------------------------------------------------------------------


def baselines(seed: int) -> dict:
    """Estimators by name; classifiers give the median of their distribution, regressors the rounded value."""
    scaled = StandardScaler()
    return {
        "median": DummyRegressor(strategy="median"),
        "majority": DummyClassifier(strategy="most_frequent"),
        "ridge": make_pipeline(scaled, RidgeCV(alphas=np.logspace(0, 5, 21))),
        "logistic": make_pipeline(scaled, LogisticRegression(C=0.01, max_iter=2000)),
        "logistic_balanced": make_pipeline(scaled, LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced")),
        "knn": make_pipeline(scaled, KNeighborsRegressor(7, weights="distance")),
        "svr": make_pipeline(scaled, SVR(C=1.0, epsilon=0.2)),
        "random_forest": RandomForestRegressor(200, min_samples_leaf=3, max_features=0.3, random_state=seed),
        "random_forest_classes": RandomForestClassifier(
            200, min_samples_leaf=3, class_weight="balanced_subsample", random_state=seed
        ),
        "extra_trees": ExtraTreesRegressor(200, min_samples_leaf=3, max_features=0.3, random_state=seed),
        "gradient_boosting": GradientBoostingRegressor(
            n_estimators=100, max_depth=2, learning_rate=0.05, subsample=0.7, max_features=0.3, random_state=seed
        ),
    }


def predict(model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratings 1..5, scores (expected rating) and the most likely texture classes of held-out cases."""
    if not hasattr(model, "predict_proba"):
        score = model.predict(x)
        rating = np.clip(np.floor(score + 0.5), 1, LEVELS)
        return rating, score, texture_class(rating)
    chance = model.predict_proba(x)
    median = (chance.cumsum(1) >= 0.5 - 1e-9).argmax(1)
    per_class = chance @ np.eye(3)[texture_class(model.classes_)]
    return model.classes_[median], chance @ model.classes_, per_class.argmax(1)


def cross_validate(name: str, x: np.ndarray, target: np.ndarray, folds: list[np.ndarray], seed: int) -> tuple:
    """Pooled predictions of the held-out folds: ratings, scores and texture classes."""
    rating, score, texture = np.zeros(len(target)), np.zeros(len(target)), np.zeros(len(target), int)
    for held_out in folds:
        train = np.setdiff1d(np.arange(len(target)), held_out)
        model = baselines(seed)[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x[train], target[train])
        rating[held_out], score[held_out], texture[held_out] = predict(model, x[held_out])
    if name in CONSTANTS:  # the constants of different folds differ, and would rank each case against its own rating
        score[:] = 0
    return rating, score, texture


# ---- figures --------------------------------------------------------------------------------------------------------


def texture_class(rating: np.ndarray) -> np.ndarray:
    """0 non-solid (1, 2), 1 part-solid (3, 4), 2 solid (5)."""
    return np.digitize(rating, (2.5, 4.5))


def spearman(truth: np.ndarray, score: np.ndarray) -> float:
    """Rank correlation; 0 where all scores are equal, which rank nothing."""
    return 0.0 if np.ptp(score) == 0 or np.ptp(truth) == 0 else float(stats.spearmanr(truth, score).statistic)


def statistics(name: str, truth: np.ndarray, rating: np.ndarray, score: np.ndarray, texture: np.ndarray):
    """Figures as a function of case counts, as `r1jax.tasks.metrics.bootstrap` wants them."""

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        error = np.abs(rating - truth)
        kappa = quadratic_kappas(truth, rating, weights)
        found = {
            "mae": weighted_mean(error, weights),
            "kappa": np.where(np.isnan(kappa), 0.0, kappa),
            "within_one": weighted_mean((error <= 1).astype(float), weights),
        }
        drawn = [np.repeat(np.arange(len(truth)), row.astype(int)) for row in weights]
        found["spearman"] = np.array([spearman(truth[rows], score[rows]) for rows in drawn])
        if name == "texture":
            true = texture_class(truth)
            right = (true == texture).astype(float)
            found["accuracy_3"] = weighted_mean(right, weights)
            recalls = [weighted_mean(right[true == k], weights[:, true == k]) for k in range(3)]
            found["balanced_accuracy_3"] = np.mean(recalls, axis=0)
        if name == "malignancy_rating":
            clear = truth != 3
            found["auc"] = rank(truth[clear] >= 4, score[clear], weights[:, clear]).auc()
        return found

    return compute


def best(models: dict, figure: str) -> tuple[str, dict]:
    """Name and figure of the best of some baselines, for fold seed 0."""
    candidates = {model: row["seed_0"][figure] for model, row in models.items()}
    sign = -1 if figure == "mae" else 1
    name = max(candidates, key=lambda model: sign * candidates[model]["value"])
    return name, candidates[name]


def table(results: dict) -> str:
    lines = [
        "| rating | figure | constant | best from the image (95 % interval) | folds: mean ± sd | best with the mask |",
        "|---|---|---|---|---|---|",
    ]
    for rating, kinds in results.items():
        image = kinds["image"]
        for figure in image["median"]["seed_0"]:
            constant, floor = best({name: image[name] for name in CONSTANTS}, figure)
            name, value = best({name: row for name, row in image.items() if name not in CONSTANTS}, figure)
            outlined, upper = best(kinds["mask"], figure)
            spread = image[name]["seeds"][figure]
            cells = (
                f"{floor['value']:.3f} {constant}",
                f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f}) {name}",
                f"{spread['mean']:.3f} ± {spread['sd']:.3f}",
                f"{upper['value']:.3f} {outlined}",
            )
            lines.append(f"| {rating} | {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(folder: Path, seeds: int, resamples: int) -> dict:
    """All baselines, ratings and kinds of features."""
    source = FolderCases.open(folder)
    batch = source.read_batch(np.arange(len(source)))
    cubes = batch["volume"].astype(np.float64) / 255 * 1400 - 1000
    tables = features(cubes, batch["mask"])
    folds = {
        seed: [FolderCases.open(folder, "val", fold=k, folds=FOLDS, seed=seed).rows for k in range(FOLDS)]
        for seed in range(seeds)
    }
    results: dict = {}
    for rating in RATINGS:
        truth = batch[f"target.{rating}"].astype(np.float64)
        results[rating] = {}
        for kind, x in tables.items():
            results[rating][kind] = {}
            for name in baselines(0):
                per_seed = []
                for seed, cut in folds.items():
                    compute = statistics(rating, truth, *cross_validate(name, x, truth, cut, seed))
                    if seed == 0:
                        headline = bootstrap(compute, len(truth), resamples=resamples)
                    per_seed.append({figure: float(v[0]) for figure, v in compute(np.ones((1, len(truth)))).items()})
                results[rating][kind][name] = {
                    "seed_0": {figure: estimate._asdict() for figure, estimate in headline.items()},
                    "seeds": {
                        figure: {
                            "mean": float(np.mean([row[figure] for row in per_seed])),
                            "sd": float(np.std([row[figure] for row in per_seed], ddof=1)) if seeds > 1 else 0.0,
                        }
                        for figure in per_seed[0]
                    },
                }
        print(f"{rating} done", flush=True)
    return {
        "cases": len(source),
        "fingerprint": source.fingerprint,
        "columns": {kind: x.shape[1] for kind, x in tables.items()},
        "ratings": {
            name: np.bincount(batch[f"target.{name}"].astype(int), minlength=6)[1:].tolist() for name in RATINGS
        },
        "results": results,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder lidc_3d_134")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=5, help="cuts into folds; also the seeds of the models")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    found = run(args.data, args.seeds, args.resamples)
    words = [Path(word).name if "/" in word else word for word in arguments]
    packages = ("numpy", "scipy", "scikit-learn")
    report = {
        "command": " ".join(["python benchmarks/lidc_baselines.py", *words]),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "seconds": round(time.perf_counter() - start, 1),
        "folds": FOLDS,
        "seeds": args.seeds,
        "resamples": args.resamples,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(report | found), parse_float=lambda number: round(float(number), 4))
    args.output.write_text(json.dumps(rounded, indent=1) + "\n")
    print(table(found["results"]))


if __name__ == "__main__":
    main(sys.argv[1:])
