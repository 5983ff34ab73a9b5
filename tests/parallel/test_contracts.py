"""What 8, 64 and 512 devices exchange for a layer of DeepSeek-V3 at full widths: what is expected, and nothing else.

One mixture layer stands for all: the others are the same program again. MTP and the dense layers are left out.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EXPERTS, VOCABULARY, CORE = r"mlp/experts/", r"embed/|jvp\(\)/shard_map", r"self_attn\._expanded/shard_map"


@pytest.fixture(scope="module", params=["8 tensor=8", "64 fsdp=8 expert=8", "512 fsdp=8 expert=8 tensor=8"])
def contract(request):
    devices, *sizes = request.param.split()
    ran = subprocess.run(
        [sys.executable, "-m", "tests.parallel.contract", devices, *sizes],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(size.split("=") for size in sizes), json.loads(ran.stdout)


def along(found, *kinds, name=""):
    """Sets of axes along which devices exchange, where the program's name matches."""
    return {"+".join(one["axes"]) for one in found if one["kind"] in kinds and re.search(name, one["name"])}


@pytest.mark.slow
def test_only_the_expected_exchanges(contract):
    sizes, found = contract
    kept = "+".join(axis for axis in ("fsdp", "expert") if axis in sizes)
    tensor, expert = "tensor" in sizes, "expert" in sizes
    assert not [one for one in found if re.search(CORE, one["name"])], "attention exchanges nothing"
    # Parts that are kept apart come together before use; neither experts nor the vocabulary do.
    assert along(found, "all-gather") == ({kept, "fsdp"} if kept else set())
    assert along(found, "all-gather", name=EXPERTS) == ({"fsdp"} if expert else set())
    assert along(found, "reduce-scatter", name=EXPERTS) == ({"fsdp"} if expert else set())
    assert along(found, "reduce-scatter", name=VOCABULARY) == ({kept} if kept else set())
    # Tokens go to their experts, and gate and up of an expert's weights to the devices of their width.
    assert along(found, "all-to-all") == ({"expert"} if expert else set()) | ({"tensor"} if tensor else set())
    assert along(found, "collective-permute") <= {"tensor"}
    assert along(found, "collective-permute", name=r"^(?!.*mlp/experts/reshape)") == set()
    whole = "+".join(axis for axis in ("fsdp", "expert", "tensor") if axis in sizes)
    assert along(found, "all-reduce") <= {kept, "tensor", "fsdp", "expert", whole} - {""}


@pytest.mark.slow
def test_no_device_has_all_experts_or_the_whole_vocabulary(contract):
    sizes, found = contract
    shapes = [shape for one in found for shape in one["shapes"]]
    if "expert" in sizes:
        assert not [shape for shape in shapes if re.match(r"\w+\[256,(2,)?\d+,\d+\]", shape)]
    if "tensor" in sizes:
        assert not [shape for shape in shapes if "129280" in shape]
