"""What `model.quant` may say, on the command line and in a config."""

from dataclasses import replace

import pytest

from r1jax.cli import load_config
from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.validation import QUANT_PRESETS, QuantRule, quant_rules, validate


def test_rules_and_presets_are_read_in_order():
    assert quant_rules(("head=float", "experts=int4/64:int8", "a=b=int8:int8:int8", "int8")) == (
        QuantRule("head", "float"),
        QuantRule("experts", "int4", "int8", None, 64),
        QuantRule("a=b", "int8", "int8", "int8"),
        QuantRule(".", "int8", "int8"),
    )
    assert quant_rules(("a=int4/64:int8/running", "int8_running")) == (
        QuantRule("a", "int4", "int8", None, 64, running=True),
        QuantRule("down_proj", "int8", "int8"),
        QuantRule(".", "int8", "int8", running=True),
    )
    assert all(quant_rules((name,)) for name in QUANT_PRESETS)


@pytest.mark.parametrize(
    "entry",
    [
        "int9",
        ".=int7",
        "=int8",
        "(=int8",
        ".=int8:fp8",
        ".=affine8:int8",
        ".=int4/0",
        ".=float/8",
        ".=int4/x",
        ".=fp8:fp8:int8",
        ".=int4/8:int8:int8",
        ".=int8:int8:int8:int8",
        ".=int8:/running",
        ".=int8:int8/run",
        ".=float:int8/running",
        ".=int8:int8:int8/running",
    ],
)
def test_what_is_no_rule_is_refused(entry):
    config = Config()
    with pytest.raises(
        UserError, match=r"model\.quant is .*a list of int8, int8_running, int8_weights, int4, fp8 or PATTERN=WEIGHTS"
    ):
        validate(replace(config, model=replace(config.model, quant=(entry,))))


def test_the_short_flag_is_that_of_the_field():
    asked = load_config(
        ["--config", "configs/medical.py", "--quant", "table=float", "int8", "--train.quant_start", "0.5"]
    )
    assert asked.config.model.quant == ("table=float", "int8") and asked.config.train.quant_start == 0.5


def test_a_start_without_rules_and_layers_that_lose_their_names_are_refused():
    config = Config()
    with pytest.raises(UserError, match=r"train\.quant_start is 0\.5"):
        validate(replace(config, train=replace(config.train, quant_start=0.5)))
    with pytest.raises(UserError, match=r"model\.scan_layers is True"):
        validate(replace(config, model=replace(config.model, quant=("int8",), scan_layers=True)))


def test_codes_beside_adapters_are_divided_over_no_devices():
    config = Config()
    config = replace(config, mesh=replace(config.mesh, fsdp=2), model=replace(config.model, quant=("int8",)))
    validate(config)
    adapted = replace(config, model=replace(config.model, lora_rank=2))
    with pytest.raises(UserError, match=r"mesh\.fsdp is 2, but it must be 1 with model\.quant and model\.lora_rank"):
        validate(adapted)
    validate(replace(adapted, train=replace(config.train, quant_start=0.5)))  # which keeps floats


def test_ranges_that_no_run_could_learn_are_refused():
    config = Config()
    running = replace(config, model=replace(config.model, quant=("experts=int8:int8", "int8_running")))
    validate(running)
    validate(replace(running, train=replace(config.train, quant_start=0.5, quant_freeze=1.0)))
    for field, told, wrong in (
        ("lora_rank is 2", "0 with /running", replace(running, model=replace(running.model, lora_rank=2))),
        ("quant_freeze is 0.5", "0.8, as", replace(config, train=replace(config.train, quant_freeze=0.5))),
        (
            "quant_freeze is 0.5",
            r"above train\.quant_start \(0\.5\)",
            replace(running, train=replace(config.train, quant_start=0.5, quant_freeze=0.5)),
        ),
    ):
        with pytest.raises(UserError, match=f"{field}, but it must be {told}"):
            validate(wrong)
