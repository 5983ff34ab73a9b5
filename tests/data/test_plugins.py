"""Plug-ins: found in three ways, named in every error, the same in workers and after a resume."""

import hashlib
import os
import sys
import types

import numpy as np
import pytest

from r1jax.data import plugins
from r1jax.data.loader import training_batches
from r1jax.data.order import GlobalOrder
from r1jax.data.pipeline import Preprocessed, changed, open_pipeline
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

SHIFT = """
import dataclasses
import numpy as np
from r1jax.data.plugins import Preprocessor

OFFSET = 100  # a global of the file must travel to workers too

@dataclasses.dataclass
class AddSome(Preprocessor):
    size: int = 1

    def process(self, case):
        return {**case, "table": case["table"] + np.float32(self.size + OFFSET)}
"""
NOISE = """
import numpy as np
from r1jax.data.plugins import Preprocessor

class Noise(Preprocessor):
    modality = "table"
    deterministic = False

    def process(self, case, rng):
        if rng is not None:
            case["table"] = case["table"] + rng.normal(size=2).astype(np.float32)
        return case
"""


AGE = Field("age", "number", "int32")


class Rows:
    """Case i has the table [i, 0]."""

    name, fingerprint = "rows", "0"
    schema = Schema(
        (Field("case_id", "category"), Field("table", "table", "float32", (2,)), Field("age", "number", "int32"))
    )

    def __len__(self):
        return 20

    def read_batch(self, indices):
        table = np.stack([indices, np.zeros(len(indices))], axis=1).astype(np.float32)
        return {
            "case_id": [f"p{i}" for i in indices],
            "table": table,
            "age": np.where(indices == 3, np.nan, indices),
            "has_image": indices > 2,
        }


def drop(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return (str(folder),)


def through(folder, text, code, indices=(1, 3)):
    source = Preprocessed(Rows(), open_pipeline(text, drop(folder, "mine.py", code)), 0)
    return source, source.read_batch(np.array(indices))


def body(line, head=""):
    """A plug-in with one line in its `process`."""
    return f"""
import numpy as np
from r1jax.data.plugins import Preprocessor
from r1jax.data.schema import Field, Schema

class Mine(Preprocessor):
    {head or "pass"}
    def process(self, case):
        {line}
"""


def test_a_dropped_file_is_used_by_name_with_arguments(tmp_path):
    source, batch = through(tmp_path / "a", "add_some(size=3)|add_some(1)", SHIFT)
    assert batch["table"].tolist() == [[205, 204], [207, 204]] and batch["table"].dtype == np.float32
    assert batch["case_id"] == ["p1", "p3"] and batch["has_image"].tolist() == [False, True]
    assert batch["age"][0] == 1 and np.isnan(batch["age"][1])
    assert source.name == "rows, through add_some(size=3)|add_some(1)"
    digest = hashlib.sha256(SHIFT.encode()).hexdigest()
    steps = source.pipeline.provenance()["steps"]
    assert steps[0] == {"step": "add_some(size=3)", "file": "mine.py", "made": digest}


def test_the_environment_names_folders_too(tmp_path, monkeypatch):
    drop(tmp_path / "a", "one.py", SHIFT)
    drop(tmp_path / "b", "two.py", NOISE)
    monkeypatch.setenv("R1JAX_PLUGIN_PATH", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    assert [step.run.__class__.__name__ for step in open_pipeline("noise|add_some").steps] == ["Noise", "AddSome"]


def test_installed_packages_and_import_paths(tmp_path, monkeypatch):
    drop(tmp_path / "lib", "hospital.py", SHIFT)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))

    class Entry:
        name, value = "shift", "hospital:AddSome"

        def load(self):
            import hospital

            return hospital.AddSome

    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: [Entry()])
    for text in ("shift(2)", "hospital:AddSome(2)"):
        (step,) = open_pipeline(text).steps
        assert step.run.size == 2 and step.made == hashlib.sha256(SHIFT.encode()).hexdigest()
    with pytest.raises(UserError, match="hospital:Nothing.*cannot be imported"):
        open_pipeline("hospital:Nothing")
    with pytest.raises(UserError, match="os:getcwd is no preprocessor"):
        open_pipeline("os:getcwd")


def test_duplicate_names_name_both_files(tmp_path):
    drop(tmp_path / "a", "one.py", SHIFT)
    folders = drop(tmp_path / "a", "two.py", SHIFT + "\n# the same again\n")
    with pytest.raises(UserError, match="'add_some' is defined twice, in .*one.py and .*two.py"):
        open_pipeline("add_some", folders)


def test_a_broken_file_stops_only_those_who_miss_something(tmp_path):
    drop(tmp_path / "a", "bad.py", "import no_such_module_anywhere")
    drop(tmp_path / "a", "worse.py", "def f(:")
    folders = drop(tmp_path / "a", "good.py", SHIFT)
    assert len(open_pipeline("add_some", folders).steps) == 1
    with pytest.raises(
        UserError, match="'add_sum'.*did you mean 'add_some'.*bad.py cannot be imported.*no_such_module"
    ) as e:
        open_pipeline("add_sum", folders)
    assert "worse.py cannot be imported (SyntaxError" in str(e.value)
    with pytest.raises(UserError, match="no folder .*nowhere"):
        open_pipeline("add_sum", (str(tmp_path / "nowhere"),))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("add_some(size=__import__('os').getcwd())", "must be plain numbers"),
        ("add_some(1)(2)", "must be plain numbers"),
        ("add_some(**{'size': 1}, *[2])", "must be plain numbers"),
        ("add_some(", "close its brackets"),
        ("add_some('", "is no step|close its brackets"),
        ("add_some||add_some", "is no step"),
        ("|", "is no step"),
        ("1 + 1", "is no step"),
        ("add_some; import os", "is no step"),
        ("add_some(length=3)", "mine.py.*takes add_some.size: int = 1"),
    ],
)
def test_pipelines_that_cannot_be_read(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        open_pipeline(text, drop(tmp_path / "a", "mine.py", SHIFT))


def test_a_bar_within_a_string_is_no_separator(tmp_path):
    folders = drop(tmp_path / "a", "mine.py", SHIFT)
    steps = open_pipeline(" add_some( size = '|(' ) | add_some ", folders).steps
    assert [step.text for step in steps] == ["add_some(size='|(')", "add_some"]
    assert open_pipeline("  ").steps == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("return None", "gives NoneType, not the case"),
        ("return {'table': case['table']}", "gives no 'case_id'"),
        (
            "return {**case, 'table': case['table'].astype(np.float64)}",
            "gives float64 .2. as 'table', where float32 .2.",
        ),
        ("return {**case, 'table': [1.0, 2.0]}", "gives list as 'table'"),
        ("return {**case, 'table': case['table'][:1]}", "gives float32 .1. as 'table'"),
        ("return {**case, 'age': 'old'}", "gives str as 'age'"),
        ("return {**case, 'age': 1.5}", "gives float as 'age'"),
        ("return {**case, 'case_id': 7}", "gives int as 'case_id', where a string"),
        ("return {**case, 'extra': 1}", "gives 'extra', which is no field: add it in `output`"),
        ("case['table'][0] = 5; return case", "failed: ValueError: .*read-only"),
        ("return 1 / 0", "failed: ZeroDivisionError"),
    ],
)
def test_what_a_plugin_does_wrong_is_named_with_file_and_case(tmp_path, line, words):
    with pytest.raises(UserError, match=f"preprocessor mine .*mine.py. of case 'p1' {words}"):
        through(tmp_path / "a", "mine", body(line))


def test_an_output_schema_changes_the_fields(tmp_path):
    code = body(
        "return {'case_id': case['case_id'], 'note': str(case['age']), 'wide': np.zeros((2, 3), np.int16)}",
        "def output(self, schema): return Schema((schema.fields[0], Field('note', 'text'), WIDE))",
    )
    code += "\nWIDE = Field('wide', 'image', 'int16', (2, 3))"
    source, batch = through(tmp_path / "a", "mine", code)
    assert source.schema.modalities == {"text", "image"}
    assert (
        batch.keys() == {"case_id", "note", "wide"} and batch["wide"].shape == (2, 2, 3) and batch["note"][0] == "1.0"
    )


def test_a_plugin_for_another_modality_is_refused(tmp_path):
    code = body("return case", "modality = 'volume'")
    with pytest.raises(UserError, match="mine.py. reads volume, but what comes to it has category, number, table"):
        through(tmp_path / "a", "mine", code)


def collate(raw):
    return {"table": raw["table"]}


@pytest.mark.parametrize("text", ["noise", "noise|noise"])
def test_randomness_depends_on_seed_batch_and_row_alone(tmp_path, text):
    pipeline = open_pipeline(text, drop(tmp_path / "a", "mine.py", NOISE))
    order = GlobalOrder(20, 4, 1)

    def take(number, seed=0, **how):
        batches = training_batches(
            Preprocessed(Rows(), pipeline, seed), collate, order, **{"start": 0, "threads": 1} | how
        )
        try:
            return [next(batches)["table"].tolist() for _ in range(number)]
        finally:
            batches.close()

    whole = take(12)
    assert take(5, start=7, threads=3) == whole[7:]
    assert take(4, start=3, workers=2) == whole[3:7]
    assert take(2, seed=1) != whole[:2]
    drawn = np.array(whole).reshape(48, 2) - np.stack([order.batch(k) for k in range(12)]).reshape(48, 1) * [1, 0]
    assert len(set(drawn[:, 1])) == 48 and abs(drawn.mean()) < 0.5  # every epoch draws anew
    source = Preprocessed(Rows(), pipeline, 0)
    assert np.array_equal(source.read_batch(np.arange(4))["table"], Rows().read_batch(np.arange(4))["table"])


def test_fingerprints_follow_the_code_and_the_arguments(tmp_path):
    one = open_pipeline("add_some(1)", drop(tmp_path / "a", "mine.py", SHIFT))
    two = open_pipeline("add_some(2)", drop(tmp_path / "a", "mine.py", SHIFT))
    three = open_pipeline("add_some(1)", drop(tmp_path / "a", "mine.py", SHIFT.replace("100", "101")))
    prints = [Preprocessed(Rows(), pipeline, 0).fingerprint for pipeline in (one, two, three)]
    assert len({*prints, "0"}) == 4
    assert changed(one.provenance(), one.provenance()) == []
    (line,) = changed(one.provenance(), three.provenance())
    assert line.startswith("add_some(1) (mine.py) is not the code of then")
    assert Preprocessed(Rows(), three, 0).read_batch(np.array([0]))["table"].tolist() == [[102, 102]]


FITTED = """
import numpy as np
from r1jax.data.plugins import Preprocessor

class Centre(Preprocessor):
    fitted = True

    def fit(self, cases):
        return {"mean": float(np.mean([case["table"][0] for case in cases]))}

    def process(self, case):
        return {**case, "table": case["table"] - np.float32(self.statistics["mean"])}
"""


def test_statistics_come_from_the_training_part_alone(tmp_path):
    folders = drop(tmp_path / "a", "mine.py", FITTED + SHIFT)
    pipeline = open_pipeline("add_some|centre", folders)
    with pytest.raises(UserError, match="centre .*mine.py. is fitted on the training part alone"):
        Preprocessed(Rows(), pipeline, 0)
    pipeline.fit(Rows())
    source = Preprocessed(Rows(), pipeline, 0)
    assert source.read_batch(np.array([0]))["table"][0, 0] == pytest.approx(-9.5)
    stored = pipeline.provenance()
    assert stored["statistics"] == {"1": {"mean": 110.5}}
    again = open_pipeline("add_some|centre", folders)
    assert again.restore(stored) == [] and Preprocessed(Rows(), again, 0).fingerprint == source.fingerprint


def test_modules_of_plugins_do_not_shadow_others(tmp_path):
    sys.modules.setdefault("mine", types.ModuleType("mine"))
    through(tmp_path / "a", "add_some", SHIFT)
    assert not hasattr(sys.modules["mine"], "AddSome")
