"""One way to score a payment that has just come in, in a process of its own; the parent asks by lines."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.edge_child import Predict, main  # noqa: E402
from r1jax.data.transaction_live import LiveHistory  # noqa: E402
from r1jax.data.transaction_rows import Row, parse, records, take  # noqa: E402
from r1jax.data.transaction_state import KeptHistory  # noqa: E402
from r1jax.data.transactions import Names  # noqa: E402

OURS, PEER = ["jax", "jaxlib", "flax", "orbax-checkpoint", "optax"], ["lightgbm"]


def opened(folder: str, kind: str) -> tuple[KeptHistory, list[Row]]:
    """The history that the parent has left, and the payments to score, the last of them first."""
    kept = KeptHistory(Path(folder) / f"{kind}.state", **json.loads((Path(folder) / "history.json").read_text()))
    kept.close()  # what comes is not put on record
    with (Path(folder) / "rows.jsonl").open() as lines:
        return kept, [parse(record, Names()) for record in records(lines)][::-1]


def model(kind: str, reasons: bool):
    """The scorer of a checkpoint, from the row to the verdict."""

    def way(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
        from r1jax.serve.scorer import Scorer
        from r1jax.tasks.finance.alerts import BANDS
        from r1jax.train.checkpoints import find_checkpoint

        kept, rows = opened(folder, kind)
        scorer, first = Scorer(find_checkpoint(Path(checkpoint))), 0 if reasons else len(BANDS)
        scorer.live, scorer.start = kept.live, kept.extra
        return lambda: scorer([rows.pop()], first), OURS

    return way


def litert(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
    """The exported model beside the same history, in a Python without JAX."""
    place = Path(folder) / "exported"
    sys.path.insert(0, str(place / "r1jax_edge.pyz"))
    from r1jax_edge.artefact import Artefact
    from r1jax_edge.cases import text_inputs

    kept, rows = opened(folder, "litert")
    artefact = Artefact(place)
    wanted = artefact.card["inputs"]

    def predict() -> object:
        row = rows.pop()
        features, streams = take(kept.live, row)
        inputs = {"series": streams.numbers[0], "series_valid": streams.valid[0], "has_numbers": np.asarray(True)}
        inputs |= {"series_state": streams.states[0].astype(np.int32)}
        inputs |= {"table": features[0]} if "table" in wanted else {}
        inputs |= text_inputs(row.note, wanted["text"]["shape"][0]) if "text" in wanted else {}
        return artefact.predict(inputs)

    return predict, ["ai-edge-litert", "pyarrow"]


def boosted(kind: str, contributions: bool):
    """LightGBM on the features of the same history; with contributions, these are exact SHAP values of its trees."""

    def way(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
        import lightgbm

        kept, rows = opened(folder, kind)
        booster = lightgbm.Booster(model_file=str(Path(folder) / "booster.txt"))

        def predict() -> object:
            features, _ = take(kept.live, rows.pop())
            return booster.predict(features, pred_contrib=contributions, num_threads=1)

        return predict, PEER

    return way


def history(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
    """The history alone, which every way keeps up to date."""
    kept, rows = opened(folder, "history")
    live: LiveHistory = kept.live
    return lambda: take(live, rows.pop()), ["numpy"]


WAYS = {
    "history": history,
    "model": model("model", False),
    "litert": litert,
    "model_reasons": model("model_reasons", True),
    "boosted": boosted("boosted", False),
    "boosted_reasons": boosted("boosted_reasons", True),
}

if __name__ == "__main__":
    main(WAYS)
