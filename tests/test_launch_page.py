"""docs/launch.md does what it says: its batch script starts processes that find each other, its manifest is one."""

import os
import random
import re
import stat
import subprocess
import sys

import pytest
import yaml

from r1jax.cli import load_config
from r1jax.parallel.launch import LOST, find_place
from r1jax.train.watch import HUNG
from tests.processes import ROOT, environment

PAGE = (ROOT / "docs" / "launch.md").read_text("utf-8")
TINY = ROOT / "tests" / "train" / "tiny_language.py"
SRUN = """#!/bin/bash
# As srun does: two tasks on one node, the highest of their exit codes.
[ "$1" = --kill-on-bad-exit=0 ] && shift
for i in 0 1; do
    SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks="$tasks $!"
done
code=0
for task in $tasks; do wait $task; got=$?; [ $got -gt $code ] && code=$got; done
exit $code
"""


def block(kind: str, start: str) -> str:
    """The one block of a kind that starts so."""
    (found,) = [text for text in re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) if text.startswith(start)]
    return found


@pytest.fixture
def slurm(tmp_path):
    """Runs the batch script of the page; its exit code, stdout, stderr and what scontrol was told."""
    (tmp_path / "train.sbatch").write_text(block("bash", "#!/bin/bash"))
    scontrol = f'#!/bin/bash\necho "$@" >> {tmp_path}/told\n'
    for name, text in {
        "srun": SRUN,
        "scontrol": scontrol,
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def run(*flags: object, **variables: str) -> tuple[int, str, str, str]:
        env = environment(1, tmp_path / "xla") | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        # The port of the coordinator is a function of the job's number.
        env["SLURM_JOB_ID"] = str(random.randrange(10**6))
        words = ["bash", str(tmp_path / "train.sbatch"), *map(str, flags)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=200)
        told = tmp_path / "told"
        return done.returncode, done.stdout, done.stderr, told.read_text() if told.exists() else ""

    return run


def test_syntax_of_the_scripts():
    for text in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.slow
def test_batch_script_starts_processes_that_find_each_other(slurm, tmp_path):
    small = ("--model.decoder.num_nextn_predict_layers", 0)  # compiles faster
    code, out, err, told = slurm("--config", TINY, "--workdir", tmp_path / "run", "--dry-run", *small)
    assert code == 0 and told == "", err
    assert "tiny-language: 2 x cpu (cpu) in 2 processes" in err and re.search(r"^mesh +.*data 2", out, re.MULTILINE)
    assert out.count("FLOPs an example") == 1  # process 0 alone speaks


@pytest.mark.parametrize(("ends", "restarts", "requeued"), [(LOST, 0, True), (LOST, 20, False), (2, 0, False)])
def test_batch_script_goes_on_after_all_but_mistakes(slurm, tmp_path, ends, restarts, requeued):
    (tmp_path / "python").write_text(f'#!/bin/bash\n[ "$1" = train.py ] || exit 9\nexit {ends}\n')
    code, _, _, told = slurm("--config", TINY, SLURM_RESTART_COUNT=str(restarts))
    assert code == ends and told.startswith("requeue ") == requeued and bool(told) == requeued


def test_manifest():
    manifest = yaml.safe_load(block("yaml", "apiVersion: jobset"))
    assert (manifest["kind"], manifest["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (job,) = manifest["spec"]["replicatedJobs"]
    work = job["template"]["spec"]
    (container,) = work["template"]["spec"]["containers"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["command"]]
    assert words[:2] == ["python", "train.py"]
    launch = load_config(words[2:]).config.launch
    place = find_place(launch, {"JOB_COMPLETION_INDEX": "1"}, 8)
    assert (place.index, place.count, place.devices) == (1, work["parallelism"], list(range(8)))
    assert (
        work["completionMode"] == "Indexed" and work["completions"] == work["parallelism"] and not work["backoffLimit"]
    )
    host, port = launch.coordinator.split(":")
    name = manifest["metadata"]["name"]
    assert host == f"{name}-{job['name']}-0-0.{name}" and container["ports"] == [{"containerPort": int(port)}]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    mounts, volumes = container["volumeMounts"], work["template"]["spec"]["volumes"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}


def test_codes_and_fields_of_the_page():
    table = PAGE.partition("## When something fails")[2].partition("## NCCL")[0]
    assert re.findall(r"\| (\d+) \|$", table, re.MULTILINE) == [str(LOST), str(HUNG), "2"]
    launch = load_config(["--config", str(TINY)]).config.launch
    for name in ("heartbeat_timeout", "connect_timeout"):
        assert f"`launch.{name}` ({getattr(launch, name)} s)" in table
