"""Typed configuration: what can be set, its defaults, and what it may be."""

import math
import operator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from r1jax.errors import UserError
from r1jax.fields import Bounds, build, leaves

Count = Annotated[int, Bounds("of at least 1", 1)]
Natural = Annotated[int, Bounds("of at least 0", 0)]
Seed = Annotated[int, Bounds("from 0 to 4294967295", 0, 2**32)]  # JAX's keys drop higher bits
Positive = Annotated[float, Bounds("above 0", math.ulp(0.0))]
Weight = Annotated[float, Bounds("of at least 0", 0.0)]
Share = Annotated[float, Bounds("of at least 0 and below 1", 0.0, 1.0)]

Fraction = Annotated[float, Bounds("from 0 to 1", 0.0, math.nextafter(1.0, 2.0))]

Modality = Literal["volume", "image", "table", "text", "series"]
Platform = Literal["auto", "cpu", "cuda"]
Split = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension of RoPE; `factor` 1 turns it off (names of Hugging Face's `rope_scaling`)."""

    factor: Annotated[float, Bounds("of at least 1", 1.0)] = 1.0
    original_max_position_embeddings: Count = 4096
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Weight = 1.0
    mscale_all_dim: Weight = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """DeepSeek-V3 decoder; the fields are those of Hugging Face's `DeepseekV3Config`."""

    vocab_size: Count = 512
    hidden_size: Count = 96
    num_hidden_layers: Count = 3
    num_attention_heads: Count = 4
    q_lora_rank: Count | None = 48
    """Rank of the query compression; None projects queries directly (V2-Lite)."""
    kv_lora_rank: Count = 32
    qk_nope_head_dim: Count = 16
    qk_rope_head_dim: Count = 8
    v_head_dim: Count = 16
    intermediate_size: Count = 256
    """Width of the dense feed-forward layers."""
    moe_intermediate_size: Count = 64
    n_routed_experts: Count = 8
    n_shared_experts: Natural = 1
    num_experts_per_tok: Count = 2
    n_group: Count = 4
    topk_group: Count = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    first_k_dense_replace: Natural = 1
    """The first layers with a dense feed-forward instead of experts."""
    num_nextn_predict_layers: Annotated[int, Bounds("of 0 or 1", 0, 2)] = 1
    """Depth of multi-token prediction; 0 leaves the MTP module out."""
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnConfig = field(default_factory=YarnConfig)
    initializer_range: Positive = 0.02


@dataclass(frozen=True)
class VisionConfig:
    """Convolutional encoder of an image (2 sizes) or a CT sub-volume (3 sizes)."""

    size: tuple[Count, ...] = (32, 32, 32)
    """Voxels read, in array order (z, y, x) or (y, x); larger inputs are cropped about the centre."""
    stem_stride: Count = 2
    widths: tuple[Count, ...] = (16, 32, 64)
    """Channels of each stage; between stages the resolution halves."""
    blocks: tuple[Count, ...] = (1, 1, 1)
    """Residual blocks of each stage."""
    norm: Literal["cell", "picture"] = "cell"
    """What a norm in the residual blocks takes the root mean square over: the channels of each cell, or all cells of a
    picture, after which bright places are still brighter than dim ones."""
    layers: Natural = 1
    """Bidirectional transformer layers over the last stage's cells."""
    num_attention_heads: Count = 4
    merge: Count = 1
    """Cells along each axis that make one token of the decoder."""


@dataclass(frozen=True)
class TableConfig:
    """Bidirectional encoder of record fields, one token a field; missing fields have their own embedding."""

    layers: Natural = 1
    frequencies: Count = 2
    """Periodic features of each numeric value; many of them learn single patients by heart."""
    num_attention_heads: Count = 4


@dataclass(frozen=True)
class SeriesConfig:
    """Bidirectional encoder of streams of events, such as the last payments of a customer."""

    layers: Natural = 1
    """Transformer layers over the events of a stream."""
    bins: Count = 16
    """Pieces of the piecewise-linear features of each number."""
    tokens: Count = 4
    """Tokens of the decoder that a stream is pooled to, beside that of its last event."""
    num_attention_heads: Count = 4


@dataclass(frozen=True)
class ModelConfig:
    """Encoders, decoder and dropout; heads and field counts come from the task."""

    modalities: tuple[Modality, ...] = ("volume", "table", "text")
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    volume: VisionConfig = field(default_factory=VisionConfig)
    image: VisionConfig = field(default_factory=lambda: VisionConfig(size=(48, 48)))
    table: TableConfig = field(default_factory=TableConfig)
    series: SeriesConfig = field(default_factory=SeriesConfig)
    text_tokens: Count = 96
    """Longest text in tokens; longer text is cut."""
    text_merge: Count = 1
    """Bytes of text that the decoder reads as one token, by the wordings that are found in them; above 1 no text is
    learned to be written."""
    text_ngrams: Natural = 0
    """Buckets of hashed words, pairs and pieces of words, whose scores are added to those of the heads; 0 leaves them
    out."""
    dropout: Share = 0.1
    lora_rank: Natural = 0
    """Rank of adapters on the decoder's attention, dense and shared feed-forward; above 0, nothing else is trained, and
    with model.quant the rest is held as codes."""
    lora_alpha: Positive = 16.0
    """Strength of the adapters: their product is scaled by lora_alpha / lora_rank."""
    precision: Literal["fp32", "bf16", "fp16", "bf16_pure"] = "fp32"
    """bf16, fp16: products in that type, with fp32 weights, optimizer, router, softmax, norms and losses; bf16_pure:
    weights and moments in bf16 too (docs/training.md)."""
    remat: Literal["none", "attention", "minimal", "full", "offload"] = "none"
    """Activations that the backward pass computes again instead of keeping them (docs/training.md): attention scores;
    all but products; whole blocks; or all but products, which wait in the host's memory."""
    quant: tuple[str, ...] = ()
    """What products are rounded to: int8, int8_running, int8_weights, int4, fp8, or rules on the paths of weights such
    as "experts=int4/64:int8" (docs/quantization.md); the first that matches counts. --quant is short for this."""
    scan_layers: bool = False
    """Compile the decoder's layers of one kind as one loop: faster to compile, one more copy of their weights."""


@dataclass(frozen=True)
class AlertConfig:
    """What becomes of a scored transaction (docs/finance_evaluation.md); thresholds are set on validation."""

    per_day: Positive = 100.0
    """Alerts a day that investigators can look at: the highest scores are to be reviewed."""
    false_positive_rate: Fraction | None = None
    """Review what stays within this false positive rate on validation, instead of a number of alerts."""
    step_up_per_day: Positive = 500.0
    """Transactions a day, alerts included, that may be asked for a second factor; at least `per_day`."""
    block_probability: Fraction = 0.9
    """Alerts of at least this calibrated probability are recommended to be blocked."""
    review_cost: Weight = 5.0
    """Cost of looking at one alert, in the currency of the amounts; for the cost curve alone."""
    calibration: Literal["isotonic", "platt"] = "isotonic"
    """How scores become probabilities, on validation: any rising map, or a sigmoid for few frauds."""


@dataclass(frozen=True)
class FinanceConfig:
    """What the finance task makes of a stream of payments (docs/finance.md)."""

    label_delay_days: Annotated[float, Bounds("of at least 1 second (1 / 86400)", 1 / 86400)] = 7.0
    """Days after which it is known whether a payment was fraud; no feature sees a label earlier."""
    events: Count = 64
    """Last payments of the customer, and as many of the terminal, that the model reads with each payment."""
    negatives_kept: Annotated[float, Bounds("above 0 and at most 1", math.ulp(0.0), math.nextafter(1.0, 2.0))] = 0.25
    """Share of the genuine payments to train on; probabilities are corrected for it."""
    train: tuple[str, ...] = ()
    """First day to learn from and the day after the last, such as 2018-05-08 2018-08-25; earlier payments are history
    alone. None are chosen by shares of the time."""
    val: tuple[str, ...] = ()
    """The same of the validation."""
    test: tuple[str, ...] = ()
    """The same of the test."""
    columns: tuple[str, ...] = ()
    """WHAT=COLUMN for each column of a file that is not called as in the Fraud Detection Handbook, such as
    time=BOOKED_AT amount=EUR; WHAT is id, time, customer, terminal, amount, fraud, text or scenario."""
    history: tuple[str, ...] = ()
    """Files of earlier payments, in the order of time and of the same columns, that are only looked back at."""
    simulated_customers: Count = 1000
    """Of the embedded generator, and as many terminals."""
    simulated_days: Count = 120
    alerts: AlertConfig = field(default_factory=AlertConfig)


@dataclass(frozen=True)
class TaskConfig:
    """What is learned from a case, and with which weights."""

    name: Literal["medical", "language", "finance", "records"] = "medical"
    records: Literal["credit", "sentiment", "stocks"] = "credit"
    """What `data.path` holds for the records task (docs/records.md)."""
    agreement: bool = False
    """For sentiment, read the other Sentences_*Agree.txt beside `data.path` too: a label is the softer, the fewer
    annotators agreed on it, and sentences that `data.path` lacks are learned from, never judged on."""
    fields: tuple[str, ...] = ()
    """Findings to learn; empty means every field of the task's schema."""
    label_smoothing: Share = 0.02
    loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy"
    """Of the records task's class: squared_hinge tells each class from the others with a margin, as a linear SVM does,
    which suits sparse n-grams; a label then counts by how many annotators more chose it than did not."""
    modality_dropout: Annotated[float, Bounds("from 0 to 0.5", 0.0, math.nextafter(0.5, 1.0))] = 0.25
    """Chance that a training case hides its images, and as large a chance that it hides its record."""
    augment: Literal["none", "flips", "affine"] = "flips"
    """flips: mirror and rotate by quarter turns; affine: also shift, scale, turn and change contrast."""
    views: Annotated[int, Bounds("from 1 to 8", 1, 9)] = 1
    """Mirrored or turned views averaged at evaluation (1 to 8)."""
    text_weight: Weight = 0.1
    """Weight of next-token prediction on the record's text; 0 leaves it out."""
    mtp_weight: Weight = 0.3
    """Weight of the multi-token prediction loss within it (DeepSeek-V3, section 4.2)."""
    mtp_final_weight: Weight = 0.1
    """The same in the last part of the run."""
    mtp_until: Fraction = 1.0
    """Share of the run after which `mtp_final_weight` takes over (DeepSeek-V3: 10 of 14.8 T tokens)."""
    z_loss: Weight = 0.0
    """Factor of the squared log normaliser in the language task, which keeps its logits from drifting."""
    balance_weight: Weight = 1e-4
    """Weight of the sequence-wise balance loss (DeepSeek-V3, equation 17)."""
    finance: FinanceConfig = field(default_factory=FinanceConfig)


@dataclass(frozen=True)
class CacheConfig:
    """Tiers that keep rows of a cold store (Parquet on HDFS, say) at hand: process memory, then LMDB or Redis."""

    url: str | None = "memory"
    """memory: of each process; lmdb:DIR: also a folder that processes of a machine share; redis://, rediss:// (TLS),
    unix:// or redis+cluster://: also a server, its password as $NAME of the environment; None reads cold each time."""
    capacity: Count = 2**28
    """Bytes of process memory, in each process that reads."""
    disk_capacity: Count = 2**32
    """Bytes of an LMDB folder; a Redis server is bounded by its own `maxmemory`."""
    ttl_s: Positive = 604800.0
    """Seconds until a value of LMDB or Redis expires (in Redis +-10 %, in the memory of policy serve too)."""
    policy: Literal["train", "serve"] = "train"
    """train: memory admits until it is full and keeps that, beside the blocks in use; serve: keeps what is popular."""
    unit: Literal["group", "row"] = "group"
    """What is kept: whole row groups, for training, or single rows, for requests without order."""


@dataclass(frozen=True)
class DataConfig:
    """Where cases come from."""

    path: str | None = None
    """Folder of cases (docs/data.md) or text (docs/language.md); none uses the embedded synthetic generator."""
    mix: tuple[str, ...] = ()
    """Further folders of cases whose training parts are mixed with that of `path`, which alone is validated on."""
    weights: tuple[Count, ...] = ()
    """Of every so many training cases, how many come from `path` and from each folder of `mix`: 3 1 takes 3 of 4."""
    tokenizer: str | None = None
    """tokenizer.json of the language task, or its folder; none takes that of `train.init`, and else bytes."""
    split: Split = "test"
    """Part that eval.py scores."""
    train_cases: Count = 12288
    val_cases: Count = 512
    test_cases: Count = 2048
    fold: Natural | None = None
    """Hold out this fold for validation instead of the folder's own split; of stocks, an earlier period (0 to 3)."""
    folds: Annotated[int, Bounds("of at least 2", 2)] = 5
    seed: Seed = 0
    """Seed of the generator and of the order of cases."""
    order: Literal["global", "window"] = "global"
    """global: any row may follow any other; window: rows are shuffled within some row groups of Parquet files, which
    are then read whole (docs/data.md)."""
    window: Count = 16
    """Row groups that are shuffled together."""
    threads: Count = 2
    """Reading threads, in each worker where there are some."""
    workers: Natural = 0
    """Processes that read and preprocess; 0 does it in threads of this process."""
    ahead: Natural = 8
    """Batches that a source with a cache is told of before they are read."""
    preprocess: str = ""
    """What cases pass through, such as "text_clean|window(-1000, 400)" (docs/plugins.md)."""
    plugins: tuple[str, ...] = ()
    """Folders of further preprocessors, beside those of the environment variable R1JAX_PLUGIN_PATH."""
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass(frozen=True)
class TrainConfig:
    """When things happen."""

    steps: Count = 800
    """Optimizer steps of the whole run, those before a resume included."""
    batch_size: Count | Literal["auto"] = 32
    """Cases of one optimizer step, on all devices; auto: as many as fit, in `accumulation` parts."""
    accumulation: Count | Literal["auto"] = 1
    """Parts in which a step computes its batch one after another, for memory; the result is that of the whole batch.
    auto: as few as fit."""
    memory_share: Fraction = 0.8
    """Share of a device's memory that auto may fill."""
    learning_rate: Positive = 2e-3
    final_learning_rate: Weight = 2e-5
    schedule: Literal["cosine", "linear", "wsd", "step", "constant"] = "cosine"
    """After the warmup: cosine or linear fall to the final rate; wsd: constant, then that linear fall in the last
    decay_share of the run; step: times milestone_factor at each milestone; constant."""
    decay_share: Fraction = 0.2
    """Last part of the run in which `wsd` lowers the rate."""
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """Shares of the run at which `step` lowers the rate."""
    milestone_factor: Positive = 0.1
    """What `step` multiplies the rate by at each milestone."""
    decoder_rate: Positive = 1.0
    """Factor on the learning rate of the decoder; encoders, queries and heads keep the full rate."""
    rules: tuple[str, ...] = ()
    """PATTERN=RATE or PATTERN=RATE:DECAY, factors on learning rate and weight decay of the weights in whose path the
    regular expression occurs, such as "embed_tokens=0.5:1"; the first that matches counts (docs/training.md)."""
    sgd: tuple[str, ...] = ()
    """Regular expressions on paths, as in rules: these weights are moved by SGD with momentum b1 instead of AdamW, and
    their decay is added to the gradient. Rates of SGD are larger: give one by rules (docs/training.md)."""
    muon: tuple[str, ...] = ()
    """Regular expressions on paths, as in rules: the matrices and convolution kernels among these weights are moved by
    Muon with momentum b1 instead of AdamW, at rates and decay of the same size (docs/training.md)."""
    warmup_steps: Natural = 50
    weight_decay: Weight = 0.05
    b1: Share = 0.9
    b2: Share = 0.95
    clip_norm: Positive = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"
    """In what the optimizer's moments are kept; bfloat16 is rounded stochastically and saves 4 bytes a weight."""
    moments_on: Literal["device", "host"] = "device"
    """Where the optimizer's moments wait between uses: `host` is the host's memory, for GPUs (docs/training.md)."""
    ema: Share = 0.99
    """Decay of the weight average that is evaluated and served; 0 keeps none, and evaluates the raw weights."""
    quant_start: Fraction = 0.0
    """Share of the run after which the products are rounded as model.quant says; until then they are of floats."""
    quant_freeze: Fraction = 0.8
    """Share of the run after which the ranges of activations stay as they are, where model.quant has /running."""
    router_bias_rate: Weight = 1e-3
    """Step of the bias-only load balancing (gamma of DeepSeek-V3)."""
    router_bias_until: Fraction = 1.0
    """Share of the run after which the biases stay as they are (DeepSeek-V3: 14.3 of 14.8 T tokens)."""
    log_every: Count = 10
    eval_every: Count = 200
    save_every: Count = 100
    keep: Count = 1
    """Newest checkpoints that are kept, beside the best one; with more of them, a run that cannot go on from the newest
    may go further back (docs/runs.md)."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the figures too; needs `r1jax[wandb]`, and works offline (docs/runs.md)."""
    spike_factor: Weight = 10.0
    """A step is refused, and after ten in a row the run goes back, where its loss is so many robust standard deviations
    above the median of those logged last (docs/runs.md); 0 refuses only what is not finite."""
    hang_timeout: Weight = 1800.0
    """Seconds without progress (a step, a batch of the evaluation, a save) after which the run ends with code 75 and
    the stacks of its threads in the run folder; 0 lets it wait for ever."""
    init: str | None = None
    """Checkpoint or run folder whose weights a fresh run starts from, where they fit; a resume ignores it."""


Devices = Annotated[int, Bounds("of at least 1, or -1", -1)]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left (docs/parallel.md)."""

    data: Devices = -1
    """Copies of the model, each with other cases."""
    fsdp: Devices = 1
    """Devices that divide the cases and keep a part of every weight each."""
    tensor: Devices = 1
    """Devices that divide heads, feed-forward widths and the vocabulary; within a node."""
    expert: Devices = 1
    """Devices that divide the experts, and the cases outside them."""
    pipe: Devices = 1
    """Devices that divide the layers, and the cases outside them."""
    sequence: Devices = 1
    """Devices that divide the length of the decoder's sequence."""
    expert_capacity: Positive = 2.0
    """Rows that a device sends another for its experts at once, as a multiple of the even share; what is more follows
    in further rounds, and nothing is dropped."""
    microbatches: Count | None = None
    """Parts of a batch that go through the layers one after another where `pipe` divides them, a multiple of it; None
    is four times `pipe`, or what divides the batch."""
    interleave: Count = 1
    """Runs of layers that each device of `pipe` has: more of them shorten the time at both ends in which some devices
    are idle, and send more."""
    overlap: bool = False
    """Whether results travel while the next microbatch is computed: no device waits for them, but each microbatch takes
    twice the turns from one to the next."""


@dataclass(frozen=True)
class LaunchConfig:
    """How several processes find each other (docs/launch.md); srun, mpirun and Kubernetes say it by themselves."""

    coordinator: str | None = None
    """HOST:PORT on which process 0 listens to the others; None takes what srun, mpirun or Kubernetes say, and without
    them there is one process."""
    processes: Count | None = None
    """Processes of the run; 1 trains alone, whatever started it."""
    process: Natural | None = None
    """Number of this process, from 0."""
    connect_timeout: Count = 300
    """Seconds in which all processes must have reached the coordinator."""
    heartbeat_timeout: Count = 20
    """Seconds of silence after which a process counts as lost, and all others end."""


@dataclass(frozen=True)
class DebugConfig:
    """Ways to find an error; none changes what is computed."""

    eager: bool = False
    """Run every step op by op, and say where a number stops being finite or an index is out of range; very slow."""


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, and a table of the costliest operations (docs/telemetry.md)."""

    steps: Natural = 0
    """Steps to trace; 0 traces none, and `--profile` alone is 5."""
    start: Natural = 10
    """Steps that this process does before it; the first ones are slower."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "medical"
    workdir: str = "runs/medical"
    """Folder of checkpoints, metrics and reports; running the same command again goes on from it."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""
    seed: Seed = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def from_dict(values: Any, source: str = "config", *, stored: bool = False) -> Config:
    """Builds a config from what `to_dict` gave, and accepts nothing else.

    Args:
      values: Nested dicts, for example the content of a checkpoint's config.json.
      source: File that the values came from, for error messages.
      stored: Whether an older revision may have written them: fields that it did not have take their defaults. A new
        field must therefore default to what was done before it came.

    Returns:
      The config, of hashable values only.

    Raises:
      UserError: A key is unknown or missing, or a value does not fit its field.
    """
    return build(Config, _without_joined(values, source) if stored else values, source, stored=stored)


def _without_joined(values: Any, source: str) -> Any:
    """Leaves out what an older revision wrote of joined fields, which at 0 said what is done now."""
    try:
        table = dict(values["model"]["table"])
    except (TypeError, KeyError, ValueError):
        return values  # `build` says what is wrong with it
    if width := table.pop("joined", 0):
        raise UserError(
            f"{source}: model.table.joined is {width!r}, a form of the table that r1jax no longer has; evaluate with "
            "the revision that trained it, or train anew."
        )
    table.pop("bins", None)
    return values | {"model": values["model"] | {"table": table}}


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Compares two configs field by field.

    Args:
      a: One config.
      b: The other.

    Returns:
      (dotted field, value in a, value in b) wherever they differ, in the order of the fields.
    """
    pairs = ((name, operator.attrgetter(name)(a), operator.attrgetter(name)(b)) for name in leaves(Config))
    return [pair for pair in pairs if pair[1] != pair[2]]
