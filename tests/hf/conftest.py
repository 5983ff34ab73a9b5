"""The stored checkpoints as folders."""

import numpy as np
import pytest

from tests.hf.checkpoints import stored, write_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of each stored checkpoint, with reference.npz beside it; nobody may change them."""
    made = {}
    for arch in ("v3", "v2"):
        published, tensors, arrays = stored(arch)
        made[arch] = write_folder(tmp_path_factory.mktemp(arch) / arch, published, tensors)
        kept = {n: x for n, x in arrays.items() if not n.startswith("gradient") and not (arch == "v3" and n == "loss")}
        np.savez(made[arch] / "reference.npz", **kept)
    return made
