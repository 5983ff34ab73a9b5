import json
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import HELP
from r1jax.arguments import EvalArguments, EvalData
from r1jax.cli import load_arguments, load_config
from r1jax.config import Config, from_dict
from r1jax.errors import UserError
from r1jax.fields import leaves, to_json
from r1jax.validation import validate

ROOT = Path(__file__).resolve().parents[1]
LEAVES = leaves(Config)
HEADER = "from r1jax.config import *\n"


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file; line 1 imports the dataclasses, the body starts at line 2."""

    def write(body: str, name: str = "exp.py") -> str:
        path = tmp_path / name
        path.write_text(HEADER + body)
        return str(path)

    return write


@pytest.fixture
def plain(config_file) -> str:
    """A config file without variants that returns the defaults."""
    return config_file("def get_config():\n    return Config()\n")


def variants_of(path: Path) -> list[str]:
    """`--config` values of a file: itself, and with each of its boolean variants."""
    names = re.findall(r"(\w+): bool = False", path.read_text())
    return [str(path), *(f"{path}:{name}" for name in names)]


CONFIGS = [text for path in sorted((ROOT / "configs").glob("*.py")) for text in variants_of(path)]


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: Path(text).name)
def test_shipped_configs_load(text):
    invocation = load_config(["--config", text])
    assert invocation.mode == "run"
    assert from_dict(json.loads(to_json(invocation.config))) == invocation.config


def test_shipped_configs_are_found():
    names = {Path(text).name for text in CONFIGS}
    assert {"medical.py", "medical.py:smoke"} <= names
    workdirs = [load_config(["--config", text]).config.workdir for text in CONFIGS]
    assert len(set(workdirs)) == len(workdirs), "two experiments write to the same folder"


def test_overrides_stand_anywhere_on_the_line(plain):
    line = ["--train.steps", "200", "--config", plain, "--train.batch-size=4", "--model.volume.size", "16", "24", "8"]
    config = load_config(line).config
    assert (config.train.steps, config.train.batch_size, config.model.volume.size) == (200, 4, (16, 24, 8))
    assert config.model.image.size == Config().model.image.size


def test_last_of_repeated_flags_counts(plain):
    assert load_config(["--config", plain, "--seed", "1", "--seed", "2"]).config.seed == 2


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--data.path", "None"], "data.path", None),
        (["--data.path", "my cases"], "data.path", "my cases"),
        (["--data.path=--odd"], "data.path", "--odd"),
        (["--data.path", "-odd"], "data.path", "-odd"),
        (["--data.path=a=b"], "data.path", "a=b"),
        (["--mesh.data", "-1"], "mesh.data", -1),
        (["--train.learning_rate", "1e-3"], "train.learning_rate", 1e-3),
        (["--train.learning_rate", "1", "--train.final_learning_rate", "0"], "train.learning_rate", 1.0),
        (["--model.volume.size=16,16,16"], "model.volume.size", (16, 16, 16)),
        (["--model.volume.size", "(16, 16, 16)"], "model.volume.size", (16, 16, 16)),
        (["--task.fields"], "task.fields", ()),
        (["--task.fields", "texture"], "task.fields", ("texture",)),
        (["--model.modalities", "image", "text"], "model.modalities", ("image", "text")),
        (["--model.decoder.norm_topk_prob", "false"], "model.decoder.norm_topk_prob", False),
        (["--model.decoder.norm-topk-prob=True"], "model.decoder.norm_topk_prob", True),
        (["--model.decoder.rope_interleave"], "model.decoder.rope_interleave", True),
        (["--model.decoder.q_lora_rank", "None"], "model.decoder.q_lora_rank", None),
        (["--model.precision", "bf16"], "model.precision", "bf16"),
    ],
)
def test_values_are_typed_by_their_field(plain, words, field, value):
    found = operator.attrgetter(field)(load_config(["--config", plain, *words]).config)
    assert (found, type(found)) == (value, type(value))


def words_of(value) -> list[str]:
    return [str(item) for item in value] if isinstance(value, tuple) else [str(value)]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_valid_number_arrives_unchanged(plain, data):
    numbers = {"train.weight_decay": st.floats(0, 1e300), "seed": st.integers(0, 2**32 - 1)}
    sizes = st.tuples(*[st.integers(1, 10**6).map(lambda n: 8 * n)] * 3)
    name, strategy = data.draw(st.sampled_from([*numbers.items(), ("model.volume.size", sizes)]))
    value = data.draw(strategy)
    assert operator.attrgetter(name)(load_config(["--config", plain, f"--{name}", *words_of(value)]).config) == value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.stps", "3"], "unknown flag '--train.stps' (did you mean '--train.steps'?)."),
        (["--steps", "3"], "unknown flag '--steps' (did you mean '--train.steps'?)."),
        (["--size", "3"], "did you mean '--model."),
        (["--print-confg"], "did you mean '--print-config'?"),
        (["--train.zzz", "3"], "unknown flag '--train.zzz'; train has steps, batch_size, "),
        (["--qqqq", "3"], "unknown flag '--qqqq'; --help lists every field."),
        (["--train", "3"], "--train is a group of fields; set one of them, for example --train.steps."),
        (["--train.steps", "x"], "--train.steps is 'x', but it must be a whole number of at least 1."),
        (["--train.steps", "3.5"], "--train.steps is '3.5', but it must be a whole number"),
        (["--train.steps", "0"], "--train.steps is '0', but it must be a whole number of at least 1."),
        (["--train.steps", "-h3"], "--train.steps is '-h3'"),
        (["--train.steps", "None"], "--train.steps is 'None'"),
        (["--train.steps"], "--train.steps has no value; it must be a whole number of at least 1."),
        (["--train.steps="], "--train.steps is ''"),
        (["--train.steps", "3", "4"], "--train.steps takes one value, but got '3 4'."),
        (["--train.learning_rate", "nan"], "--train.learning_rate is 'nan', but it must be a number above 0."),
        (
            ["--model.precision", "fp8"],
            "--model.precision is 'fp8', but it must be one of fp32, bf16, fp16, bf16_pure.",
        ),
        (["--model.modalities", "volume", "sound"], "--model.modalities is 'volume sound'"),
        (["--model.volume.size", "3", "b", "3"], "--model.volume.size is '3 b 3'"),
        (["--model.volume.size", "32", "32"], "model.volume.size is (32, 32), but it must be 3 sizes, (z, y, x)."),
        (["--model.decoder.norm_topk_prob", "yes"], "must be True or False"),
        (["--name", "None"], "--name cannot be None; it must be text."),
        (["--dry-run", "3"], "--dry-run takes no value, but got '3'."),
        (["--train.steps", "20"], "train.warmup_steps is 50, but it must be below train.steps (20)."),
    ],
)
def test_bad_overrides_are_one_sentence(plain, capsys, words, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        load_config(["--config", plain, *words])
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no experiment was named; add --config FILE.py"),
        (["--train.steps", "3"], "no experiment was named"),
        (["--config"], "--config takes one Python file, for example configs/medical.py"),
        (["configs/medical.py"], "unexpected argument 'configs/medical.py'; did you mean --config?"),
        (["--config", "exp.yaml"], "--config is 'exp.yaml', but it must be a Python file"),
        (["--config", "no/such.py"], "the config file 'no/such.py' does not exist."),
        (["--config", str(ROOT / "configs/medcal.py")], "medical.py'?)"),
    ],
)
def test_bad_config_flags_are_one_sentence(arguments, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(arguments)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def get_config(:\n", "exp.py, line 2: invalid syntax."),
        ("import nosuchmodule\n", "exp.py, line 2: ModuleNotFoundError: No module named 'nosuchmodule'."),
        ("import sys\nsys.exit(3)\n", "exp.py, line 3: SystemExit: 3."),
        ("\n\ndef get_config():\n    return 1 // 0\n", "exp.py, line 5: ZeroDivisionError"),
        ("def get_config():\n    raise ValueError('a\\nb')\n", "exp.py, line 3: ValueError: a b."),
        ("config = Config()\n", "exp.py has no function get_config"),
        ("def get_config():\n    return None\n", "exp.py: get_config returned None, but it must return"),
        ("def get_config():\n    return ModelConfig()\n", "exp.py: get_config returned ModelConfig("),
        ("def get_config(*, n: int):\n    return Config()\n", "exp.py needs a value of its variant 'n'"),
        ("def get_config(*, n: Nope = 1):\n    return Config()\n", "exp.py, line 2: NameError: name 'Nope'"),
    ],
)
def test_broken_config_files_are_one_sentence(config_file, body, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        load_config(["--config", config_file(body)])
    assert "\n" not in str(error.value)


def test_wrong_values_of_a_config_file_name_the_file(config_file):
    # Built without __init__, as a plain run does without this suite's run-time type checks.
    path = config_file(
        "def get_config():\n    train = TrainConfig()\n    object.__setattr__(train, 'steps', '3')\n"
        "    return Config(train=train)\n"
    )
    with pytest.raises(UserError, match=re.escape("exp.py: train.steps is '3', but it must be a whole number")):
        load_config(["--config", path])


def test_a_directory_is_no_config_file(tmp_path):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match="folder.py' cannot be read: Is a directory"):
        load_config(["--config", str(tmp_path / "folder.py")])


VARIANTS = """
def get_config(*, smoke: bool = False, steps: int = 300, name: str = "a", path: str | None = "p", bare=0.5):
    data = DataConfig(path=path)
    return Config(name=name, data=data, train=TrainConfig(steps=steps, ema=bare), platform="cpu" if smoke else "auto")
"""


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("", "platform", "auto"),
        (":", "platform", "auto"),
        (":smoke", "platform", "cpu"),
        (":smoke,steps=200", "train.steps", 200),
        (":steps=200, smoke", "platform", "cpu"),
        (":smoke=False", "platform", "auto"),
        (":name=x=y:z", "name", "x=y:z"),
        (":path=None", "data.path", None),
        (":bare=0.25", "train.ema", 0.25),
    ],
)
def test_variants_are_typed_by_the_signature(config_file, text, field, value):
    config = load_config(["--config", config_file(VARIANTS) + text]).config
    assert operator.attrgetter(field)(config) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (":smok", "exp.py has no variant 'smok' (did you mean 'smoke'?); it has smoke, steps, name, path, bare."),
        (":steps=x", "exp.py: the variant steps is 'x', but it must be a whole number."),
        (":steps", "exp.py: the variant steps has no value; it must be a whole number."),
        (":smoke=2", "exp.py: the variant smoke is '2', but it must be True or False."),
        (":name=None", "exp.py: the variant name cannot be None"),
    ],
)
def test_bad_variants_are_one_sentence(config_file, text, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(["--config", config_file(VARIANTS) + text])


def test_overrides_beat_variants(config_file):
    line = ["--train.steps", "77", "--config", config_file(VARIANTS) + ":steps=200"]
    assert load_config(line).config.train.steps == 77


def test_print_config_is_the_resolved_config(plain, capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--config", plain, "--print-config", "--train.steps", "99"])
    assert left.value.code == 0
    printed = from_dict(json.loads(capsys.readouterr().out))
    assert printed == load_config(["--config", plain, "--train.steps", "99"]).config
    validate(printed)


def test_dry_run_is_a_mode(plain):
    assert load_config(["--config", plain, "--dry-run"]).mode == "dry-run"
    assert load_config(["--config", plain, "--dry_run", "--seed", "1"]).mode == "dry-run"


def helped(capsys, load, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        load(list(arguments))
    assert not left.value.code
    return capsys.readouterr().out


def test_help_lists_every_field_with_its_default(config_file, capsys):
    text = helped(capsys, load_config, "--help")
    assert [name for name in LEAVES if f"--{name} " not in text] == []
    for part in ("--print-config", "--dry-run", "Examples:", "Rank of the query compression", "(default: 800)"):
        assert part in text
    text = helped(capsys, load_config, "-h", "--config", config_file(VARIANTS) + ":steps=1234")
    assert "(default: 1234)" in text
    assert "smoke: bool = False" in text


def load_eval_arguments(words):
    return load_arguments(EvalArguments, words, "eval.py", HELP)


def test_eval_arguments(capsys):
    arguments = load_eval_arguments(["--data.split", "all", "--checkpoint", "runs/x", "--batch-size=3"])
    assert arguments.checkpoint == "runs/x"
    assert arguments.data == EvalData(split="all")
    assert (arguments.batch_size, arguments.output) == (3, None)
    text = helped(capsys, load_eval_arguments, "--help")
    assert all(flag in text for flag in ("--checkpoint", "--data.path", "--language", "Examples:"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no checkpoint was named; add --checkpoint, for example: python eval.py"),
        (["--checkpoint"], "--checkpoint has no value"),
        (["--checkpoint", "a", "--chekpoint", "b"], "did you mean '--checkpoint'?"),
        (["--checkpoint", "a", "--data.split", "tets"], "one of train, val, test, all or None"),
        (["--checkpoint", "a", "--resamples", "0"], "--resamples is '0'"),
    ],
)
def test_bad_eval_arguments_are_one_sentence(arguments, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_eval_arguments(arguments)


def test_tuples_are_lists_of_words_only_where_the_field_is_a_list():
    assert {name for name, hint in LEAVES.items() if get_origin(hint) is tuple} == {
        "model.modalities",
        "model.quant",
        "task.fields",
        "train.milestones",
        "train.rules",
        "train.sgd",
        "train.muon",
        "data.plugins",
        "data.mix",
        "data.weights",
        *(f"model.{kind}.{name}" for kind in ("volume", "image") for name in ("size", "widths", "blocks")),
        *(f"task.finance.{name}" for name in ("train", "val", "test", "columns", "history")),
    }


@dataclass(frozen=True)
class Arguments:
    """What a command with words of its own takes."""

    folder: str
    output: str
    sizes: tuple[int, ...] = ()
    batch_size: int = 1
    loud: bool = False


def load_words(line):
    return load_arguments(Arguments, line.split(), "do", "Does.\n\nExamples:\n  do DIR OUT\n", ("folder", "output"))


@pytest.mark.parametrize(
    "line",
    [
        "a b --batch-size 3 --sizes 1 2",
        "a --batch-size 3 b --sizes 1 2",
        "--batch_size 3 a b --sizes 1 2",
        "b --sizes 1 2 --folder=a --batch-size=3",
        "--folder a --output b --sizes 1,2 --batch-size 3",
    ],
)
def test_words_without_flag_fill_positional_fields(line):
    assert load_words(line) == Arguments("a", "b", (1, 2), 3)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "no folder was named; add FOLDER, for example: do DIR OUT"),
        ("a", "no output was named; add OUTPUT, for example: do DIR OUT"),
        ("a b c", "unexpected argument 'c'"),
        ("a b --batch-size", "--batch_size has no value"),
        ("a b --loud yes", "--loud is 'yes'"),
        ("a b --sizes 1 x", "--sizes is '1 x'"),
        ("a b --btch-size 3", "did you mean '--batch_size'?"),
    ],
)
def test_bad_words_are_one_sentence(line, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_words(line)
