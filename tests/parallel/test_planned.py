"""What train.py says of meshes whose devices are not there."""

import re

import pytest

COMMON = ("--config", "configs/language.py:smoke", "--mesh.data", 1)


@pytest.fixture
def run(trainings, tmp_path):
    """Runs train.py with some flags: exit code, and the lines of stdout and stderr."""

    def run(*flags):
        out, err = tmp_path / "out", tmp_path / "err"
        code = trainings.start(out, err, *COMMON, *flags).wait(200)
        return code, out.read_text("utf-8").splitlines(), err.read_text("utf-8").splitlines()

    return run


def test_shows_where_weights_lie(run):
    code, out, err = run("--mesh.show", "--mesh.fsdp", 64, "--mesh.tensor", 2, "--model.decoder.hidden_size", 1024)
    assert code == 0, err
    rows = [re.split(r"\s{2,}", line.strip()) for line in out]
    assert ["decoder/lm_head/weight", "264 x 1024", "tensor, fsdp", "132 x 16", "8,448"] in rows
    assert ["128 devices: fsdp 64, tensor 2"] in rows


def test_what_cannot_be_divided_is_refused_before_anything_is_compiled(run):
    code, _, err = run("--mesh.show", "--mesh.expert", 3)
    assert code == 2
    told = "error: mesh.expert is 3, but model.decoder.n_routed_experts is 8: it must be a multiple of mesh.expert"
    assert err[-1] == told


@pytest.mark.slow
def test_plans_for_devices_that_are_not_there(run):
    code, out, err = run("--dry-run", "--mesh.fsdp", 4, "--mesh.expert", 4, "--train.batch_size", 16)
    assert code == 0, err
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out if "  " in line.strip())
    assert rows["mesh"] == "fsdp 4, expert 4"
    assert "of an H100: the step fits" in rows["memory of a device"]
    assert float(rows["all-to-all, expert"].split()[0]) > 0
    assert rows["H100s need at least"].endswith("ms if nothing")
