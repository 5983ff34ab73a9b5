"""Losses of the findings: unknown targets weigh nothing; parts, total and predictions against closed forms."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import TaskConfig
from r1jax.models.moe import RouterStats
from r1jax.models.r1 import Inputs, Output
from r1jax.tasks.language.loss import text_losses
from r1jax.tasks.medical.loss import (
    WEIGHTS,
    finding_loss,
    location_loss,
    predictions,
    total_loss,
)
from r1jax.tasks.medical.schema import FINDING, FINDINGS

CASES = 4
CONFIG = TaskConfig(label_smoothing=0.1, text_weight=0.5, mtp_weight=0.3, balance_weight=0.2)


def draw(seed=0):
    """Raw heads and known targets of every finding."""
    rng = np.random.default_rng(seed)
    heads, targets = {}, {}
    for finding in FINDINGS:
        heads[finding.name] = jnp.asarray(rng.standard_normal((CASES, finding.width)), jnp.float32)
        match finding.kind:
            case "binary":
                targets[finding.name] = rng.integers(0, 2, CASES)
            case "rating":
                targets[finding.name] = rng.integers(1, finding.width + 1, CASES)
            case "length":
                targets[finding.name] = rng.uniform(3, 30, CASES)
            case "vector":
                targets[finding.name] = rng.normal(0, 15, (CASES, 3))
    return heads, {name: jnp.asarray(t, jnp.float32) for name, t in targets.items()}


def output_of(heads, router=(), **others):
    fields = ("where", "text_states", "mtp_states", "lm_head")
    return Output(heads, router, **{name: others.get(name) for name in fields})


def closed_form(name, raw, target, smoothing):
    """Loss of one case in float64."""
    raw, kind = np.asarray(raw, np.float64), FINDING[name].kind
    if kind == "binary":
        p, y = 1 / (1 + np.exp(-raw[0])), (1 - smoothing) * target + smoothing / 2
        return -y * np.log(p) - (1 - y) * np.log(1 - p)
    if kind == "rating":
        y = (1 - smoothing) * np.eye(len(raw))[int(target) - 1] + smoothing / len(raw)
        return -y @ (raw - np.log(np.exp(raw).sum()))
    error = raw - np.log(target / 10) if kind == "length" else raw - np.asarray(target, np.float64) / 10
    return np.where(np.abs(error) <= 1, error**2 / 2, np.abs(error) - 0.5).mean()


@pytest.mark.parametrize("name", list(FINDING))
def test_finding_loss_equals_closed_form(name):
    heads, targets = draw()
    loss, known = finding_loss(name, heads[name], targets[name], 0.1)
    expected = [closed_form(name, r, t, 0.1) for r, t in zip(heads[name], np.asarray(targets[name]), strict=True)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(known, np.ones(CASES))


def loss_of(heads, targets):
    return total_loss(output_of(heads), Inputs(), targets, CONFIG)


value_and_gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))


@pytest.mark.parametrize("finding", [None, "malignancy", "center_mm", "long_axis_mm", "texture"])
def test_unknown_targets_weigh_nothing(finding):
    """Of one finding everywhere, or of every finding in case 0."""
    heads, targets = draw()
    unknown = {
        name: jnp.full_like(t, jnp.nan) if name == finding else t if finding else t.at[0].set(jnp.nan)
        for name, t in targets.items()
    }
    (loss, parts), gradient = value_and_gradient(heads, unknown)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradient.values())
    if finding:
        assert parts[finding] == 0 and not np.any(gradient[finding])
        (_, all_parts), all_gradient = value_and_gradient(heads, targets)
        for name in FINDING.keys() - {finding}:
            assert parts[name] == all_parts[name]
            np.testing.assert_array_equal(gradient[name], all_gradient[name])
    else:
        assert not any(np.any(g[0]) for g in gradient.values()) and all(np.any(g[1:]) for g in gradient.values())
        rest = [{name: x[1:] for name, x in tree.items()} for tree in (heads, targets)]
        np.testing.assert_allclose(loss, loss_of(*rest)[0], rtol=1e-6)


def test_nothing_known_is_a_loss_of_zero():
    heads, targets = draw()
    (loss, _), gradient = value_and_gradient(heads, {name: jnp.full_like(t, jnp.nan) for name, t in targets.items()})
    assert loss == 0 and not any(np.any(g) for g in gradient.values())


def test_one_unknown_coordinate_makes_the_centre_unknown():
    heads, targets = draw()
    _, known = finding_loss("center_mm", heads["center_mm"], targets["center_mm"].at[1, 2].set(jnp.nan), 0.0)
    np.testing.assert_array_equal(known, [1, 0, 1, 1])


def test_location_loss_shares_the_centre_among_the_cells_around_it():
    """Volume of 8 x 16 x 16 voxels in 2 x 4 x 4 cells: a cell is 4 voxels wide."""
    rng = np.random.default_rng(0)
    where, spacing = rng.standard_normal((5, 2, 4, 4)), np.array([[2.0, 0.5, 1.0]] * 5)
    voxels = np.array([[2.0, 2.0, -6.0], [0.0, 4.0, 3.0], [0.0, 0.0, 0.0], [np.nan] * 3, [np.nan] * 3])
    share = np.zeros((5, 2, 4, 4))
    share[0, 1, 2, 0] = 1  # the middle of a cell
    for z, y, x in np.ndindex(2, 2, 2):  # halfway along z and y; 3 voxels are cell 2.25 along x
        share[1, z, 2 + y, 2 + x] = 0.5 * 0.5 * (0.25 if x else 0.75)
    present = np.array([1.0, np.nan, 0.0, 0.0, 1.0])  # cases 2 and 3 have none, case 4 is somewhere
    p = 1 / (1 + np.exp(-where))
    expected = -(share * np.log(p) + (1 - share) * np.log(1 - p)).sum((1, 2, 3))
    arrays = [jnp.asarray(a, jnp.float32) for a in (where, voxels * spacing, present, spacing)]

    @jax.jit
    def loss_and_gradient(where):
        loss, back, known = jax.vjp(lambda w: location_loss(w, *arrays[1:], (8, 16, 16)), where, has_aux=True)
        return loss, back(jnp.ones_like(loss))[0], known

    loss, gradient, known = loss_and_gradient(arrays[0])
    np.testing.assert_array_equal(known, [1, 1, 1, 1, 0])
    np.testing.assert_allclose(loss[:4], expected[:4], rtol=1e-5)
    np.testing.assert_allclose(gradient[:4], (p - share)[:4], rtol=0, atol=1e-5)
    assert np.isfinite(gradient).all()


def test_total_is_the_weighted_sum_of_its_parts():
    heads, targets = draw()
    rng = np.random.default_rng(1)
    draw_states = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    states, second, head = draw_states(3, 6, 5), draw_states(3, 5, 5), draw_states(7, 5)
    inputs = Inputs(text=jnp.asarray(rng.integers(0, 7, (3, 6)), jnp.int32), text_valid=jnp.ones((3, 6), bool))
    router = tuple(RouterStats(jnp.ones(4), jnp.asarray(x), jnp.ones((1, 4))) for x in (1.0, 3.0))
    output = output_of(heads, router=router, text_states=states, mtp_states=second, lm_head=head)
    total, parts = total_loss(output, inputs, targets, CONFIG)
    first, ahead = text_losses(output, inputs.text, inputs.text_valid)
    np.testing.assert_allclose(parts["text"], first + 0.3 * ahead, rtol=1e-6)
    late = replace(CONFIG, mtp_until=0.5)
    for share, weight in ((0.4, 0.3), (0.5, 0.1)):
        text = total_loss(output, inputs, targets, late, jnp.asarray(share))[1]["text"]
        np.testing.assert_allclose(text, first + weight * ahead, rtol=1e-6)
    assert parts.keys() == FINDING.keys() | {"text", "balance"}
    assert parts["balance"] == 2.0
    expected = sum(WEIGHTS[FINDING[n].kind] * float(parts[n]) for n in FINDING)
    np.testing.assert_allclose(total, expected + 0.5 * float(parts["text"]) + 0.2 * 2.0, rtol=1e-6)


def test_predictions_invert_the_targets_of_the_losses():
    heads, _ = draw()
    heads["center_mm"] = jnp.asarray([[0.5, -1.0, 2.0]] * CASES)
    heads["long_axis_mm"] = jnp.log(jnp.asarray([[0.3], [1.0], [1.2], [3.0]]))
    predicted = predictions(heads)
    assert predicted.keys() == FINDING.keys()
    np.testing.assert_allclose(predicted["center_mm"], [[5, -10, 20]] * CASES, rtol=1e-6)
    np.testing.assert_allclose(predicted["long_axis_mm"], [3, 10, 12, 30], rtol=1e-6)
    for name in ("center_mm", "long_axis_mm"):
        assert not np.any(np.abs(finding_loss(name, heads[name], predicted[name], 0.1)[0]) > 1e-10)
    np.testing.assert_allclose(predicted["malignancy"], 1 / (1 + np.exp(-heads["malignancy"][:, 0])), rtol=1e-6)
    texture = np.exp(np.asarray(heads["texture"], float))
    np.testing.assert_allclose(predicted["texture"], texture / texture.sum(-1, keepdims=True), rtol=1e-5)
