"""What ties the fields of a config to each other: rules beyond the type of any one of them."""

import math
import operator
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from r1jax.config import (
    Config,
    DecoderConfig,
    LaunchConfig,
    MeshConfig,
    ModelConfig,
    SeriesConfig,
    TableConfig,
    TrainConfig,
    VisionConfig,
    from_dict,
)
from r1jax.errors import UserError, nearest
from r1jax.fields import to_dict

CACHE_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "lmdb")


def validate(config: Config) -> None:
    """Refuses values that cannot work, before anything is built from them.

    Args:
      config: Any config, also one whose values have the wrong type.

    Raises:
      UserError: Names the field, its value and what is possible.
    """
    config = from_dict(to_dict(config))
    for holds, name, rule in _relations(config):
        if not holds:
            raise UserError(f"config: {name} is {operator.attrgetter(name)(config)!r}, but it must be {rule}.")


def _relations(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Yields (does it hold, field, what it must be) for each rule that ties fields; later ones rely on earlier ones."""
    for name in ("name", "workdir"):
        yield bool(getattr(config, name).strip()), name, "a name, not empty"
    for holds, name, rule in decoder_relations(config.model.decoder):
        yield holds, f"model.decoder.{name}", rule
    yield from _encoder_relations(config.model)
    yield from _task_relations(config)
    check_cache_url("data.cache.url", config.data.cache.url)
    data, train = config.data, config.train
    yield data.path is None or bool(data.path.strip()), "data.path", "a folder, or None for generated cases"
    yield not data.mix or data.path is not None, "data.path", "a folder, as data.mix is mixed with it"
    folders = len(data.mix) + 1 if data.mix else 0
    yield len(data.weights) == folders, "data.weights", f"{folders} numbers, for data.path and each of data.mix if any"
    yield len({data.path, *data.mix}) == len(data.mix) + 1, "data.mix", "other folders than data.path, each once"
    periods = config.task.name == "records" and config.task.records == "stocks"  # whose folds are no such ones
    below = data.fold is None or periods or data.fold < data.folds
    yield below, "data.fold", f"below data.folds ({data.folds})"
    yield train.wandb is None or bool(train.wandb.strip()), "train.wandb", "the name of a project, or None"
    yield train.warmup_steps < train.steps, "train.warmup_steps", f"below train.steps ({train.steps})"
    size, parts, rate = train.batch_size, train.accumulation, train.learning_rate
    yield (size, parts) != ("auto", "auto"), "train.accumulation", "a number where train.batch_size is auto"
    rule = f"a multiple of train.accumulation ({parts})"
    yield "auto" in (size, parts) or size % parts == 0, "train.batch_size", rule
    yield train.final_learning_rate <= rate, "train.final_learning_rate", f"at most train.learning_rate ({rate})"
    late = all(round(share * train.steps) > train.warmup_steps for share in train.milestones)
    rule = f"after the warmup ({train.warmup_steps} of {train.steps} steps)"
    yield train.schedule != "step" or late, "train.milestones", rule
    yield all(map(_is_rule, train.rules)), "train.rules", "a list of PATTERN=RATE or PATTERN=RATE:DECAY"
    for name, patterns in (("train.sgd", train.sgd), ("train.muon", train.muon)):
        yield all(map(_is_pattern, patterns)), name, "a list of regular expressions on the paths of weights"
    kept = train.moments_on == "device" or (config.mesh.pipe == 1 and not config.debug.eager)
    yield kept, "train.moments_on", "device with mesh.pipe or debug.eager"
    quant, presets = config.model.quant, ", ".join(QUANT_PRESETS)
    form = "PATTERN=WEIGHTS[/BLOCK][:ACTIVATIONS[/running][:GRADIENTS]]"
    yield all(map(_is_quant_rule, quant)), "model.quant", f"a list of {presets} or {form} (docs/quantization.md)"
    yield not (quant and config.model.scan_layers), "model.scan_layers", "False with model.quant, which names layers"
    yield not quant or config.mesh.pipe == 1, "mesh.pipe", "1 with model.quant, which names layers"
    yield bool(quant) or not train.quant_start, "train.quant_start", "0 without model.quant"
    running = any(rule.running for rule in quant_rules(quant))
    rule = "0 with /running in model.quant: beside adapters no ranges are learned"
    yield not (running and config.model.lora_rank), "model.lora_rank", rule
    usual = TrainConfig.quant_freeze
    yield running or train.quant_freeze == usual, "train.quant_freeze", f"{usual}, as model.quant has no /running"
    rule = f"above train.quant_start ({train.quant_start}), from which on ranges are learned"
    yield not running or train.quant_freeze > train.quant_start, "train.quant_freeze", rule
    codes, mesh = quant and config.model.lora_rank and not train.quant_start, config.mesh
    for axis in ("fsdp", "tensor", "expert", "sequence"):
        rule = "1 with model.quant and model.lora_rank, whose codes are whole on every device; take mesh.data"
        yield not codes or getattr(mesh, axis) == 1, f"mesh.{axis}", rule
    yield from _mesh_relations(config.mesh)
    known = "auto" not in (size, parts) or config.mesh.microbatches is None
    yield known, "mesh.microbatches", "None where train.batch_size or train.accumulation is auto"
    yield from _launch_relations(config.launch)


def _mesh_relations(mesh: MeshConfig) -> Iterator[tuple[bool, str, str]]:
    """Ties the sizes of the mesh."""
    axes = ("data", "fsdp", "tensor", "expert", "pipe", "sequence")
    for name in axes:
        yield getattr(mesh, name) != 0, f"mesh.{name}", "a number of devices of at least 1, or -1"
    free = [name for name in axes if getattr(mesh, name) == -1]
    if len(free) > 1:
        yield False, f"mesh.{free[1]}", f"a number of devices: mesh.{free[0]} takes what is left, and only one axis can"
    for name, usual in (("interleave", 1), ("microbatches", None), ("overlap", False)):
        rule = f"{usual}, as mesh.pipe is 1 and no layers are divided"
        yield mesh.pipe != 1 or getattr(mesh, name) == usual, f"mesh.{name}", rule


def _launch_relations(launch: LaunchConfig) -> Iterator[tuple[bool, str, str]]:
    """Yields the rules of processes."""
    named = launch.coordinator is None or re.fullmatch(r"\S+:\d{1,5}", launch.coordinator)
    yield bool(named), "launch.coordinator", "HOST:PORT, or None"
    below = None in (launch.process, launch.processes) or launch.process < launch.processes
    yield below, "launch.process", f"below launch.processes ({launch.processes})"


class Rule(NamedTuple):
    """What one entry of `train.rules` says of the weights that it matches."""

    pattern: str
    """Regular expression that occurs in their path."""
    rate: float
    """Factor on the learning rate."""
    decay: float | None
    """Factor on the weight decay; None leaves it as it is, on for matrices and off for the rest."""


def read_rule(text: str) -> Rule:
    """Reads one entry of `train.rules`.

    Args:
      text: PATTERN=RATE or PATTERN=RATE:DECAY.

    Returns:
      The rule.

    Raises:
      ValueError: The text is no such rule.
    """
    pattern, _, factors = text.rpartition("=")
    rate, colon, decay = factors.partition(":")
    rule = Rule(pattern, float(rate), float(decay) if colon else None)
    if not pattern or not all(0 <= x < math.inf for x in (rule.rate, rule.decay or 0.0)):
        raise ValueError(text)
    re.compile(pattern)
    return rule


def _is_rule(text: str) -> bool:
    try:
        read_rule(text)
    except (ValueError, re.error):
        return False
    return True


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)


class QuantRule(NamedTuple):
    """What one entry of `model.quant` says of the weights that it matches."""

    pattern: str
    """Regular expression that occurs in their path."""
    weights: str
    """int8, int4, fp8 or affine8; float leaves the product as it is."""
    activations: str | None = None
    """int8 or fp8; None multiplies floats with the rounded weight."""
    gradients: str | None = None
    """int8, rounded stochastically; None leaves the backward pass in floats."""
    block: int | None = None
    """Numbers of a row of weights that share a scale; None is the whole row."""
    running: bool = False
    """Whether all activations of a weight share a range that training learns; otherwise each row has its own."""


QUANT_PRESETS = {
    "int8": (".=int8:int8",),
    "int8_running": ("down_proj=int8:int8", ".=int8:int8/running"),
    "int8_weights": (".=int8",),
    "int4": ("(embed_tokens|lm_head|position|queries|missing)=int8", ".=int4/128"),
    "fp8": (".=fp8:fp8",),
}
"""Rules by a short name; int4 keeps 8 bits for what is looked up or added, and for the language head. The inputs of
down_proj are products of two activations, whose outliers one range for all would not bear: each row keeps its own."""
ACTIVATIONS = {"int8": ("int8",), "int4": ("int8",), "fp8": ("fp8",), "affine8": (), "float": ()}
"""What may be multiplied with each type of weights."""


def quant_rules(entries: tuple[str, ...]) -> tuple[QuantRule, ...]:
    """Reads `model.quant`.

    Args:
      entries: PATTERN=WEIGHTS[/BLOCK][:ACTIVATIONS[/running][:GRADIENTS]], or names of presets.

    Returns:
      The rules in order.

    Raises:
      ValueError: An entry is no such rule.
    """
    return tuple(read_quant_rule(text) for entry in entries for text in QUANT_PRESETS.get(entry, (entry,)))


def read_quant_rule(text: str) -> QuantRule:
    """Reads one rule of `model.quant`.

    Args:
      text: PATTERN=WEIGHTS[/BLOCK][:ACTIVATIONS[/running][:GRADIENTS]].

    Returns:
      The rule.

    Raises:
      ValueError: The text is no such rule.
    """
    pattern, _, types = text.rpartition("=")
    weights, *more = types.split(":")
    weights, slash, block = weights.partition("/")
    activations, gradients = [*more, None, None][:2]
    running = activations is not None and activations.endswith("/running")
    activations = activations.removesuffix("/running") if running else activations
    rule = QuantRule(pattern, weights, activations, gradients, int(block) if slash else None, running)
    sound = weights in ACTIVATIONS and activations in (None, *ACTIVATIONS[weights]) and len(more) < 3
    # Gradients contract over the outputs, each of which must have one scale.
    sound &= gradients is None or (gradients, activations, rule.block) == ("int8", "int8", None)
    if not (pattern and sound and (rule.block is None or (rule.block > 0 and weights != "float"))):
        raise ValueError(text)
    re.compile(pattern)
    return rule


def _is_quant_rule(entry: str) -> bool:
    try:
        quant_rules((entry,))
    except (ValueError, re.error):
        return False
    return True


def check_cache_url(name: str, url: str | None, secrets: bool = False) -> None:
    """Refuses a cache that cannot exist, and a password that would be stored in every checkpoint.

    Args:
      name: Of the field, for the message.
      url: As in `CacheConfig.url`.
      secrets: Whether the password itself may stand in the URL: nothing stores it.

    Raises:
      UserError: The scheme is unknown, a part is missing, or the URL holds a password; it is not repeated then.
    """
    if url in (None, "memory"):
        return
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in CACHE_SCHEMES:
        meant = nearest(scheme, ("memory", *CACHE_SCHEMES))
        raise UserError(
            f"{name} starts with {scheme[:40]!r}, which is no kind of cache{meant}: it must be memory, lmdb:DIR, "
            "redis://HOST:PORT, rediss://HOST:PORT, unix:///SOCKET or redis+cluster://HOST:PORT"
        )
    if scheme == "lmdb":
        if not rest.strip():
            raise UserError(f"{name} is {url!r}, but the folder is missing: write lmdb:DIR")
        return
    try:
        parts = urlsplit(url)
        port, password = parts.port, parts.password
    except ValueError as error:
        raise UserError(f"{name}: {error}: write {scheme}://HOST:PORT") from None
    if scheme == "unix" and not parts.path.strip("/"):
        raise UserError(f"{name} names no socket: write unix:///SOCKET, with three slashes before an absolute path")
    if scheme != "unix" and (not parts.hostname or port == 0):
        raise UserError(f"{name} names no host: write {scheme}://HOST:PORT")
    if "password=" in parts.query or (password is not None and not password.startswith("$") and not secrets):
        raise UserError(
            f"{name} holds a password, which every checkpoint would store: write {scheme}://USER:$NAME@... and put the "
            "password into the environment variable NAME"
        )


def decoder_relations(decoder: DecoderConfig) -> Iterator[tuple[bool, str, str]]:
    """Ties the decoder's fields; DeepSeek-V3's group limit scores a group by its two best experts.

    Args:
      decoder: Values that fit their fields.

    Yields:
      (does it hold, field, what it must be) for each rule.
    """
    experts, groups, kept = decoder.n_routed_experts, decoder.n_group, decoder.topk_group
    yield decoder.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even: RoPE turns channels in pairs"
    yield (
        decoder.first_k_dense_replace <= decoder.num_hidden_layers,
        "first_k_dense_replace",
        f"at most num_hidden_layers ({decoder.num_hidden_layers})",
    )
    yield experts % groups == 0, "n_routed_experts", f"a multiple of n_group ({groups})"
    yield (
        groups == 1 or experts >= 2 * groups or decoder.scoring_func == "softmax",
        "n_group",
        f"at most half of n_routed_experts ({experts}): a group is scored by its two best experts",
    )
    yield kept <= groups, "topk_group", f"at most n_group ({groups})"
    reach = kept * (experts // groups)
    yield (
        decoder.num_experts_per_tok <= reach,
        "num_experts_per_tok",
        f"at most the {reach} experts of topk_group ({kept}) groups",
    )


def _task_relations(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Yields what each task asks of the model."""
    kinds, merge = config.model.modalities, config.model.text_merge
    written = config.task.name == "language" or (config.task.name == "medical" and config.task.text_weight > 0)
    rule = "1 where text is learned byte by byte: by the language task, or with a task.text_weight above 0"
    yield merge == 1 or "text" not in kinds or not written, "model.text_merge", rule
    known = config.task.name == "records" or config.task.loss == "cross_entropy"
    yield known, "task.loss", f"cross_entropy: the {config.task.name} task has no other"
    rule = "0 with task.loss squared_hinge, whose labels are of one class"
    yield config.task.loss == "cross_entropy" or not config.task.label_smoothing, "task.label_smoothing", rule
    if config.task.name == "medical":
        yield bool(set(kinds) - {"text"}), "model.modalities", "at least one modality besides text"
        yield "series" not in kinds, "model.modalities", "without series, which the medical task has none of"
        yield config.data.tokenizer is None, "data.tokenizer", "None: the medical task reads text as bytes"
    elif config.task.name == "finance":
        yield "series" in kinds, "model.modalities", "a list with series for the finance task"
        yield set(kinds) <= {"series", "table", "text"}, "model.modalities", "of series, table and text for that task"
        yield config.data.tokenizer is None, "data.tokenizer", "None: the finance task reads text as bytes"
        yield not config.data.mix, "data.mix", "empty for the finance task: give one stream in the order of time"
        yield config.data.fold is None, "data.fold", "None for the finance task: its parts are periods of time"
        alerts = config.task.finance.alerts
        rule = f"at least task.finance.alerts.per_day ({alerts.per_day:g})"
        yield alerts.step_up_per_day >= alerts.per_day, "task.finance.alerts.step_up_per_day", rule
    elif config.task.name == "records":
        yield config.data.path is not None, "data.path", "a file or folder of that kind (docs/records.md)"
        yield set(kinds) <= {"series", "table", "text"}, "model.modalities", "of series, table and text for that task"
        yield bool(kinds), "model.modalities", "at least one modality"
        yield config.data.tokenizer is None, "data.tokenizer", "None: the records task reads text as bytes"
        yield not config.data.mix, "data.mix", "empty for the records task: put the cases into one file"
        counted = config.task.records == "sentiment"
        yield counted or not config.task.agreement, "task.agreement", "False: only sentences have files of agreement"
    else:
        yield not config.data.mix, "data.mix", "empty for the language task: put the files into one folder"
        yield kinds == ("text",), "model.modalities", "text alone for the language task"
        yield config.model.text_tokens > 2, "model.text_tokens", "at least 3: MTP predicts the token after next"
        yield (
            not config.model.text_ngrams,
            "model.text_ngrams",
            "0 for the language task, which summarises no text",
        )


def _encoder_relations(model: ModelConfig) -> Iterator[tuple[bool, str, str]]:
    """Yields the encoders' rules."""
    kinds, merge = model.modalities, model.text_merge
    whole = "text" not in kinds or model.text_tokens % merge == 0
    yield whole, "model.text_tokens", f"a multiple of model.text_merge ({merge})"
    yield len(kinds) == len(set(kinds)), "model.modalities", "a list that names each modality once"
    for name, rank, axes in (("volume", 3, "(z, y, x)"), ("image", 2, "(y, x)")):
        group, vision = f"model.{name}", getattr(model, name)
        yield len(vision.size) == rank, f"{group}.size", f"{rank} sizes, {axes}"
        yield len(vision.widths) > 0, f"{group}.widths", "the width of at least one stage"
        stages = len(vision.widths)
        yield len(vision.blocks) == stages, f"{group}.blocks", f"as long as {group}.widths ({stages})"
        cell = vision.stem_stride * 2 ** (stages - 1) * vision.merge
        yield (
            all(n % cell == 0 for n in vision.size),
            f"{group}.size",
            f"multiples of {cell}, stem_stride x 2^(stages - 1) x merge",
        )
        yield _heads(f"{group}.num_attention_heads", vision, vision.widths[-1], f"the last of {group}.widths")
    for name, encoder in (("table", model.table), ("series", model.series)):
        yield _heads(
            f"model.{name}.num_attention_heads", encoder, model.decoder.hidden_size, "model.decoder.hidden_size"
        )


def _heads(
    name: str, encoder: VisionConfig | TableConfig | SeriesConfig, width: int, origin: str
) -> tuple[bool, str, str]:
    """States that attention heads share the width evenly; without layers nothing is shared."""
    even = encoder.layers == 0 or width % encoder.num_attention_heads == 0
    return even, name, f"a divisor of {origin} ({width})"
