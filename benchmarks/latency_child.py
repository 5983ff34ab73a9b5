"""One way to score a payment that has just come in, in a process of its own; the parent asks by lines."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.edge_child import Predict, main  # noqa: E402
from r1jax.data.transaction_live import LiveHistory  # noqa: E402
from r1jax.data.transaction_rows import Row, parse, records, take  # noqa: E402
from r1jax.data.transaction_state import KeptHistory  # noqa: E402
from r1jax.data.transactions import DAY, Names  # noqa: E402
from r1jax.serve.scorer import Scorer  # noqa: E402
from r1jax.tasks.finance.alerts import BANDS  # noqa: E402
from r1jax.train.checkpoints import find_checkpoint  # noqa: E402

OURS, PEER = ["jax", "jaxlib", "flax", "orbax-checkpoint", "optax"], ["lightgbm"]


def opened(folder: str, checkpoint: str, kind: str) -> tuple[KeptHistory, list[Row]]:
    """The history that the parent has left, and the payments to score, the last of them first."""
    finance = find_checkpoint(Path(checkpoint)).config().task.finance
    kept = KeptHistory(Path(folder) / f"{kind}.state", round(DAY * finance.label_delay_days), finance.events)
    kept.close()  # what comes is not put on record
    with (Path(folder) / "rows.jsonl").open() as lines:
        return kept, [parse(record, Names()) for record in records(lines)][::-1]


def model(kind: str, explain: int):
    """The scorer of a checkpoint, from the row to the verdict."""

    def way(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
        kept, rows = opened(folder, checkpoint, kind)
        scorer = Scorer(find_checkpoint(Path(checkpoint)))
        scorer.live, scorer.start = kept.live, kept.extra
        return lambda: scorer([rows.pop()], explain), OURS

    return way


def boosted(kind: str, contributions: bool):
    """LightGBM on the features of the same history; with contributions, these are exact SHAP values of its trees."""

    def way(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
        import lightgbm

        kept, rows = opened(folder, checkpoint, kind)
        booster = lightgbm.Booster(model_file=str(Path(folder) / "booster.txt"))

        def predict() -> object:
            features, _ = take(kept.live, rows.pop())
            return booster.predict(features, pred_contrib=contributions, num_threads=1)

        return predict, PEER

    return way


def history(folder: str, checkpoint: str) -> tuple[Predict, list[str]]:
    """The history alone, which every way keeps up to date."""
    kept, rows = opened(folder, checkpoint, "history")
    live: LiveHistory = kept.live
    return lambda: take(live, rows.pop()), ["numpy"]


WAYS = {
    "history": history,
    "model": model("model", len(BANDS)),
    "model_reasons": model("model_reasons", 0),
    "boosted": boosted("boosted", False),
    "boosted_reasons": boosted("boosted_reasons", True),
}

if __name__ == "__main__":
    main(WAYS)
