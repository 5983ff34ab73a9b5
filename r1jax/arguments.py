"""What commands that read a checkpoint are told, and the defaults: what is scored, and how tokens are chosen."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from r1jax.config import Count, Natural, Platform, Positive, Share, Split, Weight
from r1jax.fields import Bounds


@dataclass(frozen=True)
class EvalData:
    """Which cases to score, where they are not those that the checkpoint was trained beside."""

    path: str | None = None
    """Folder of cases (docs/data.md) or text (docs/language.md); none takes the data of the checkpoint's own config."""
    split: Split | None = None
    """Part of the data; none takes the config's `data.split`, and all of data that was not trained on."""
    tokenizer: str | None = None
    """tokenizer.json or its folder, for an import that was made without; none takes the checkpoint's own."""


@dataclass(frozen=True)
class EvalArguments:
    """What eval.py is told."""

    checkpoint: str
    """Run folder, its checkpoints folder, one checkpoint, or what `r1jax hf import` has written; must be given."""
    data: EvalData = field(default_factory=EvalData)
    output: str | None = None
    """Folder of the results; none writes `eval/` beside the checkpoints, or into an import."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""
    batch_size: Count = 64
    resamples: Count = 500
    """Bootstrap resamples of each interval."""
    pictures: Natural = 12
    """Cases drawn on the HTML page."""
    language: Literal["en", "zh"] = "en"
    """Language of the structured reports' texts."""
    alerts_per_day: Positive | None = None
    """Alerts a day, of the finance task; none takes the checkpoint's `task.finance.alerts`."""
    reasons: Natural = 200
    """Alerts, the highest scores first, whose reasons are computed; each takes the time of about 200 scores."""


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen, and when a row ends."""

    max_new_tokens: Count = 128
    """Most tokens a row may get; its pages are taken for this many."""
    temperature: Weight = 0.0
    """Divides the logits; 0 takes the most probable token each time (greedy)."""
    top_k: Natural = 0
    """Draw from the k most probable tokens only; 0 from all."""
    top_p: Annotated[float, Bounds("above 0 and at most 1", math.ulp(0.0), math.nextafter(1.0, 2.0))] = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum."""
    min_p: Share = 0.0
    """Draw from tokens at least this probable, as a share of the most probable one."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that the prompt or the answer holds already."""
    stop_tokens: tuple[Natural, ...] = ()
    """A row ends after the first of these."""
    speculate: bool = False
    """Let MTP draft every second token and the decoder verify two at a time; greedy only, and the same tokens."""
    page_size: Count = 64
    """Tokens in a page of the cache."""
    cache: Literal["float", "int8", "fp8"] = "float"
    """How the cache holds latents: in the dtype of the products, or as codes of 8 bits with a scale a token; rotary
    keys stay as they are."""
