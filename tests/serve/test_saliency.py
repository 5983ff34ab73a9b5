import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config, DecoderConfig, ModelConfig, TaskConfig, VisionConfig
from r1jax.data.synthetic import SyntheticCases
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.serve.saliency import AIR, attributions, explained_finding, explained_output, saliency_maps, smooth
from r1jax.tasks.medical.task import Medical

CONFIG = Config(
    model=ModelConfig(
        modalities=("volume", "table"),
        decoder=DecoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        volume=VisionConfig(size=(16, 16, 16), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
    ),
    task=TaskConfig(fields=("nodule_present", "texture"), text_weight=0.0),
)


def collated(task, source, count: int) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, task.collate(source.read_batch(np.arange(count))))


@pytest.fixture(scope="module")
def built():
    """Model, task, weights large enough to matter, source."""
    task = Medical(CONFIG)
    model, source = R1(CONFIG.model, task.heads), SyntheticCases(0, 8, "test", (20, 16, 12))
    inputs, _ = task.prepare(collated(task, source, 2))
    params = jax.jit(lambda key: model.init(key, inputs)["params"])(jax.random.key(0))
    return model, task, jax.tree.map(lambda x: 2 * x, params), source


def test_attributions_add_up_to_what_the_picture_changes(built):
    model, task, params, source = built
    batch = collated(task, source, 2)
    found = jax.jit(lambda params, batch: attributions(model, task, params, batch, "volume", 100))(params, batch)
    inputs, _ = task.prepare(batch)
    logit = jax.jit(lambda x: model.apply({"params": params}, x).heads["nodule_present"][:, 0])
    change = logit(inputs) - logit(inputs._replace(volume=jnp.full_like(inputs.volume, AIR)))
    assert np.abs(change).min() > 1e-3
    np.testing.assert_allclose(found.sum(axis=(1, 2, 3)), change, rtol=0.03, atol=2e-3)  # the maximum has kinks


def test_maps_lie_where_the_model_reads(built):
    model, task, params, source = built
    maps = saliency_maps(model, task, make_mesh(CONFIG.mesh), params, source, [3, 5, 6], "volume")
    assert [one.shape for one in maps] == [(20, 16, 12)] * 3
    for one in maps:
        assert one.max() > 0 and (one >= 0).all()
        assert not one[:2].any() and not one[-2:].any()  # the model reads the 16 planes in the middle
    alone = saliency_maps(model, task, make_mesh(CONFIG.mesh), params, source, [5], "volume")
    np.testing.assert_allclose(alone[0], maps[1], rtol=1e-3, atol=1e-6)


def test_a_hidden_picture_has_no_saliency(built):
    model, task, params, source = built
    batch = collated(task, source, 1) | {"has_volume": jnp.zeros(1, bool)}
    assert not np.asarray(attributions(model, task, params, batch, "volume", 1)).any()


def test_smoothing_keeps_the_sum_of_a_point():
    x = jnp.zeros((1, 7, 7)).at[0, 3, 3].set(16.0)
    np.testing.assert_allclose(smooth(x)[0, 2:5, 2:5], [[1, 2, 1], [2, 4, 2], [1, 2, 1]])


def test_the_presence_of_a_nodule_is_explained_first():
    assert explained_finding(("texture", "malignancy", "nodule_present")) == "nodule_present"
    assert explained_finding(("center_mm", "margin", "texture")) == "texture"
    assert explained_finding(("center_mm",)) == "center_mm"


def test_a_rating_is_explained_by_its_expected_level():
    raw = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4, 1e-9]]))
    np.testing.assert_allclose(explained_output("texture", raw), [3.0], rtol=1e-5)
