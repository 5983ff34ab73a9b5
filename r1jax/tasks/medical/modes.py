"""What a model is really shown of given data, and the best AUC that anyone could reach with that."""

import math
from collections.abc import Collection

from r1jax.data.pipeline import original
from r1jax.data.source import Source
from r1jax.tasks.medical.batch import PICTURES

MODES = {
    "both": {"hide_images": False, "hide_record": False},
    "image_only": {"hide_images": False, "hide_record": True},
    "record_only": {"hide_images": True, "hide_record": False},
}
"""What of a case the model is shown."""

_CEILING = {"both": "both", "image_only": "image", "record_only": "record"}


def shown_modes(reads: Collection[str], has: Collection[str]) -> dict[str, str]:
    """The modes worth scoring, under the names that say what is seen.

    Args:
      reads: Modalities of the model.
      has: Modalities of the data.

    Returns:
      Mode of the evaluator to mode that is reported: all as they are where pictures and record meet; otherwise only
      `both`, which hides nothing, reported as `image_only` or `record_only`.
    """
    shared = set(reads) & set(has)
    if shared & set(PICTURES) and shared - set(PICTURES):
        return {mode: mode for mode in MODES}
    return {"both": "image_only" if shared & set(PICTURES) else "record_only"}


def best_attainable(source: Source) -> dict[str, dict[str, float]]:
    """Best AUC of malignancy on exactly these cases, where the source can compute it.

    Args:
      source: Synthetic cases know it, real ones do not.

    Returns:
      By reported mode, then by finding; empty where it is unknown or undefined.
    """
    source = original(source)
    known = source.ceilings() if hasattr(source, "ceilings") else {}
    return {
        mode: {"malignancy": known[name]}
        for mode, name in _CEILING.items()
        if name in known and not math.isnan(known[name])
    }
