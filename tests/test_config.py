import dataclasses
import json
import operator
import re
import types
from typing import Annotated, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import language
from r1jax.arguments import EvalArguments
from r1jax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DebugConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    TableConfig,
    TaskConfig,
    TrainConfig,
    VisionConfig,
    differences,
    from_dict,
)
from r1jax.errors import UserError
from r1jax.fields import Bounds, leaves, to_dict, to_json
from r1jax.validation import check_cache_url, validate

LEAVES = leaves(Config)


def values(hint) -> st.SearchStrategy:
    """Values that a field takes."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated and inner[0] is int:
        return st.integers(inner[1].low, min(inner[1].high, 2**40) - 1)
    if origin is Annotated:
        return st.floats(inner[1].low, min(inner[1].high, 1e300), exclude_max=True)
    if origin is tuple:
        return st.lists(values(inner[0]), max_size=4).map(tuple)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values, inner))
    plain = {bool: st.booleans(), str: st.text(), types.NoneType: st.none()}
    return plain[hint] if hint in plain else st.sampled_from(inner)


def nested(values: dict) -> dict:
    """Nested dicts from values by dotted name."""
    tree: dict = {}
    for name, value in values.items():
        group = tree
        *path, last = name.split(".")
        for part in path:
            group = group.setdefault(part, {})
        group[last] = value
    return tree


def attributes(config) -> dict:
    """Values by dotted name."""
    return {name: operator.attrgetter(name)(config) for name in LEAVES}


def unbounded(hint) -> bool:
    """Whether a field's type has a number without Bounds in it."""
    if get_origin(hint) is Annotated:
        return not isinstance(get_args(hint)[1], Bounds)
    return hint in (int, float) or any(unbounded(part) for part in get_args(hint))


def test_every_number_states_its_bounds():
    assert unbounded(int | None)
    assert [name for name, hint in (LEAVES | leaves(EvalArguments)).items() if unbounded(hint)] == []


def test_defaults_are_valid():
    validate(Config())
    for name, hint in LEAVES.items():
        if get_origin(hint) is Annotated:
            bounds = get_args(hint)[1]
            assert bounds.low <= operator.attrgetter(name)(Config()) < bounds.high


@settings(max_examples=30)
@given(st.fixed_dictionaries({name: values(hint) for name, hint in LEAVES.items()}))
def test_json_round_trip(drawn):
    config = from_dict(nested(drawn))
    assert attributes(config) == drawn
    back = from_dict(json.loads(to_json(config)))
    assert back == config
    assert hash(back) == hash(config)
    assert json.loads(to_json(config)) == to_dict(config)
    assert differences(config, back) == []


@given(st.data())
def test_differences_name_the_field_that_was_changed(data):
    before = attributes(Config())
    name = data.draw(st.sampled_from(sorted(LEAVES)))
    value = data.draw(values(LEAVES[name]))
    changed = from_dict(nested(before | {name: value}))
    assert differences(Config(), changed) == ([(name, before[name], value)] if value != before[name] else [])


def test_json_has_one_field_a_line():
    lines = to_json(Config()).splitlines()
    assert '      "size": [32, 32, 32],' in lines
    assert '    "steps": 800,' in lines
    assert sum(": {" not in line and line.strip(" {},") != "" for line in lines) == len(LEAVES)


def test_whole_numbers_become_floats():
    raw = to_dict(Config())
    raw["train"]["learning_rate"] = 1
    rate = from_dict(raw).train.learning_rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("group", "key", "value", "told"),
    [
        (
            "train",
            "steps",
            "200",
            "run/config.json: train.steps is '200', but it must be a whole number of at least 1.",
        ),
        ("train", "steps", 2.0, "train.steps is 2.0"),
        ("train", "steps", True, "train.steps is True"),
        ("train", "steps", None, "train.steps is None"),
        ("train", "steps", 0, "of at least 1"),
        ("train", "learning_rate", float("nan"), "a number above 0"),
        ("train", "learning_rate", float("inf"), "a number above 0"),
        ("train", "learning_rate", 10**400, "a number above 0"),
        ("train", "ema", 1.0, "at least 0 and below 1"),
        (
            "task",
            "finance",
            {"label_delay_days": 5e-6},
            "label_delay_days is 5e-06, but it must be a number of at least 1 second",
        ),
        ("model", "precision", "fp8", "one of fp32, bf16, fp16, bf16_pure"),
        ("model", "modalities", ["volume", "sound"], "each item one of volume, image, table, text"),
        ("model", "modalities", "volume", "a list"),
        ("model", "decoder", 3, "model.decoder must be a group of fields, not 3"),
        ("data", "fold", "1", "a whole number of at least 0 or None"),
        ("data", "seed", 2**32, "from 0 to 4294967295"),
        ("train", "stps", 1, "unknown field 'train.stps' (did you mean 'steps'?)"),
    ],
)
def test_strict_reading_names_the_field(group, key, value, told):
    raw = to_dict(Config())
    raw[group][key] = value
    with pytest.raises(UserError, match=re.escape(told)) as error:
        from_dict(raw, "run/config.json")
    assert str(error.value).startswith("run/config.json: ")


def test_missing_field_and_wrong_root_are_named():
    raw = to_dict(Config())
    del raw["model"]["decoder"]["rope_scaling"]["factor"]
    with pytest.raises(UserError, match=re.escape("'model.decoder.rope_scaling.factor' is missing")):
        from_dict(raw)
    with pytest.raises(UserError, match=re.escape("run/config.json must be a group of fields, not [1]")):
        from_dict([1], "run/config.json")


def test_a_stored_config_of_an_older_revision_takes_defaults_for_what_came_later():
    config = Config(data=DataConfig(order="window"), model=ModelConfig(image=VisionConfig(size=(32, 32))))
    raw = to_dict(config)
    del raw["data"]["cache"], raw["data"]["workers"], raw["model"]["image"]["blocks"], raw["mesh"]["fsdp"]
    read = from_dict(raw, stored=True)
    assert read.data == config.data and read.mesh == config.mesh
    assert read.model.image == dataclasses.replace(config.model.image, blocks=VisionConfig().blocks)
    with pytest.raises(UserError, match="'model.image.blocks' is missing"):
        from_dict(raw)
    raw["data"]["shards"] = 3
    with pytest.raises(UserError, match="unknown field 'data.shards'"):
        from_dict(raw, stored=True)
    del raw["data"]["shards"]
    raw["data"]["seed"] = -1
    with pytest.raises(UserError, match="data.seed is -1"):
        from_dict(raw, stored=True)


def test_a_stored_config_may_name_the_joined_table_that_went_where_it_was_not_used():
    raw = to_dict(Config())
    raw["model"]["table"] |= {"joined": 0, "bins": 24}
    assert from_dict(raw, stored=True) == Config()
    with pytest.raises(UserError, match=re.escape("unknown field 'model.table.joined'")):
        from_dict(raw)
    raw["model"]["table"]["joined"] = 256
    with pytest.raises(UserError, match=re.escape("run/config.json: model.table.joined is 256")):
        from_dict(raw, "run/config.json", stored=True)


def decoder(**changes) -> Config:
    return Config(model=ModelConfig(decoder=DecoderConfig(**changes)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (decoder(qk_rope_head_dim=7), "model.decoder.qk_rope_head_dim is 7"),
        (decoder(first_k_dense_replace=4), "first_k_dense_replace is 4, but it must be at most num_hidden_layers (3)"),
        (decoder(n_routed_experts=10), "n_routed_experts is 10, but it must be a multiple of n_group (4)"),
        (decoder(n_routed_experts=4), "model.decoder.n_group is 4, but it must be at most half"),
        (decoder(topk_group=5), "topk_group is 5, but it must be at most n_group (4)"),
        (decoder(num_experts_per_tok=5), "num_experts_per_tok is 5, but it must be at most the 4 experts"),
        (
            decoder(hidden_size=98),
            "num_attention_heads is 4, but it must be a divisor of model.decoder.hidden_size (98)",
        ),
        (Config(model=ModelConfig(modalities=())), "model.modalities is ()"),
        (Config(model=ModelConfig(modalities=("text",))), "it must be at least one modality besides text"),
        (Config(model=ModelConfig(modalities=("text", "text"))), "model.modalities is ('text', 'text')"),
        (Config(model=ModelConfig(volume=VisionConfig(size=(32, 32)))), "model.volume.size is (32, 32)"),
        (Config(model=ModelConfig(image=VisionConfig())), "model.image.size is (32, 32, 32)"),
        (
            Config(model=ModelConfig(image=VisionConfig(size=(36, 32)))),
            "model.image.size is (36, 32), but it must be mult",
        ),
        (Config(model=ModelConfig(volume=VisionConfig(num_attention_heads=3))), "the last of model.volume.widths (64)"),
        (Config(model=ModelConfig(volume=VisionConfig(blocks=(1,)))), "model.volume.blocks is (1,)"),
        (Config(model=ModelConfig(volume=VisionConfig(blocks=(), widths=()))), "model.volume.widths is ()"),
        (Config(model=ModelConfig(table=TableConfig(num_attention_heads=5))), "model.table.num_attention_heads is 5"),
        (Config(model=ModelConfig(dropout=1.0)), "model.dropout is 1.0"),
        (
            Config(model=ModelConfig(text_merge=5), task=TaskConfig(text_weight=0.0)),
            "model.text_tokens is 96, but it must be a multiple of model.text_merge (5)",
        ),
        (
            Config(model=ModelConfig(text_merge=8)),
            "model.text_merge is 8, but it must be 1 where text is learned byte by byte",
        ),
        (Config(task=TaskConfig(views=9)), "task.views is 9, but it must be a whole number from 1 to 8"),
        (Config(task=TaskConfig(modality_dropout=0.6)), "task.modality_dropout is 0.6"),
        (Config(data=DataConfig(fold=5)), "data.fold is 5, but it must be below data.folds (5)"),
        (Config(data=DataConfig(path=" ")), "data.path is ' '"),
        (Config(train=TrainConfig(batch_size=0)), "train.batch_size is 0"),
        (Config(train=TrainConfig(steps=50)), "train.warmup_steps is 50, but it must be below train.steps (50)"),
        (Config(train=TrainConfig(final_learning_rate=0.1)), "train.final_learning_rate is 0.1"),
        (Config(mesh=MeshConfig(data=0)), "mesh.data is 0"),
        (Config(mesh=MeshConfig(fsdp=-1)), "mesh.fsdp is -1"),
        (
            Config(mesh=MeshConfig(data=1, expert=-1, tensor=-1)),
            "mesh.expert is -1, but it must be a number of devices",
        ),
        (
            Config(mesh=MeshConfig(interleave=2)),
            "mesh.interleave is 2, but it must be 1, as mesh.pipe is 1 and no layers are divided",
        ),
        (
            Config(mesh=MeshConfig(overlap=True)),
            "mesh.overlap is True, but it must be False, as mesh.pipe is 1",
        ),
        (
            Config(mesh=MeshConfig(pipe=2, microbatches=8), train=TrainConfig(accumulation="auto")),
            "mesh.microbatches is 8, but it must be None where train.batch_size or train.accumulation is auto",
        ),
        (Config(mesh=MeshConfig(sequence=0)), "mesh.sequence is 0"),
        (
            Config(model=ModelConfig(quant=("decoder=int8",)), mesh=MeshConfig(pipe=2)),
            "mesh.pipe is 2, but it must be 1 with model.quant, which names layers",
        ),
        *(
            (dataclasses.replace(elsewhere, train=TrainConfig(moments_on="host")), "must be device with mesh.pipe or")
            for elsewhere in (Config(mesh=MeshConfig(pipe=2)), Config(debug=DebugConfig(eager=True)))
        ),
        (Config(workdir=""), "workdir is ''"),
    ],
)
def test_impossible_values_are_refused(config, told):
    with pytest.raises(UserError, match=re.escape(told)):
        validate(config)


def test_periods_of_stocks_are_no_folds():
    stocks = TaskConfig(name="records", records="stocks")
    model = ModelConfig(modalities=("series", "table"))
    validate(Config(model=model, task=stocks, data=DataConfig(path="stocks", fold=3, folds=2)))
    credit = dataclasses.replace(stocks, records="credit")
    with pytest.raises(UserError, match="data.fold is 3, but it must be below data.folds"):
        validate(Config(model=model, task=credit, data=DataConfig(path="x", fold=3, folds=2)))


def test_rules_that_do_not_apply_are_not_enforced():
    validate(decoder(n_routed_experts=4, scoring_func="softmax"))
    validate(Config(model=ModelConfig(volume=VisionConfig(layers=0, num_attention_heads=3))))
    validate(Config(mesh=MeshConfig(data=2, fsdp=-1)))


def test_deepseek_v3_itself_is_valid():
    config = language.get_config(deepseek_v3=True)
    validate(config)
    assert config.model.decoder == language.DEEPSEEK_V3 and config.model.scan_layers
    with pytest.raises(UserError, match="deepseek_v3 goes with neither smoke nor init"):
        language.get_config(deepseek_v3=True, smoke=True)


@pytest.mark.parametrize(
    "url",
    [
        None,
        "memory",
        "lmdb:/var/cache",
        "redis://host",
        "rediss://host:6379/2?ssl_ca_certs=ca.pem",
        "unix:///run/redis.sock?db=1",
        "redis+cluster://host:7000",
        "redis://me:$SECRET@host",
    ],
)
def test_caches_that_can_be(url):
    check_cache_url("data.cache.url", url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "no kind of cache"),
        ("reddis://host", "did you mean 'redis'"),
        ("Memory", "did you mean 'memory'"),
        ("host:6379", "no kind of cache"),
        ("lmdb:", "the folder is missing"),
        ("redis://", "names no host"),
        ("redis://host:0", "names no host"),
        ("redis://host:port", "write redis://HOST:PORT"),
        ("redis://host:99999", "write redis://HOST:PORT"),
        ("unix://", "names no socket"),
        ("redis://me:s3cret@host", "every checkpoint would store"),
        ("unix:///run/redis.sock?password=s3cret", "every checkpoint would store"),
    ],
)
def test_caches_that_cannot_be_are_refused_without_telling_secrets(url, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        validate(Config(data=DataConfig(cache=CacheConfig(url=url))))
    assert "data.cache.url" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_password_may_stand_where_nothing_stores_it():
    check_cache_url("--cache", "redis://me:s3cret@host", secrets=True)
