"""Which tokens are predicted from which, and the mean over exactly those, against loops in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import TaskConfig
from r1jax.models.r1 import Output
from r1jax.tasks.language.loss import counted, mtp_weight, text_losses

END = 2


def draw(seed=0):
    """Three rows of tokens: documents of several lengths, one that fills its row, one row without any token."""
    rng = np.random.default_rng(seed)
    text = rng.integers(3, 9, (3, 8))
    text[0, [2, 3, 6]], text[1, 4] = END, END
    valid = np.ones((3, 8), bool)
    valid[1, 6:], valid[2] = False, False
    states, second, head = (rng.standard_normal(n).astype(np.float32) for n in ((3, 8, 5), (3, 7, 5), (9, 5)))
    output = Output({}, (), None, jnp.asarray(states), jnp.asarray(second), jnp.asarray(head))
    return output, jnp.asarray(text, jnp.int32), jnp.asarray(valid)


def expected(logits, text, valid, ahead, end):
    """Mean cross-entropy of the tokens `ahead` places on, over those that exist within one document."""
    losses = []
    for row, place in np.ndindex(*np.shape(text)):
        source = place - ahead
        if source < 0 or not valid[row, source : place + 1].all() or end in np.asarray(text)[row, source:place]:
            continue
        x = np.asarray(logits[row, source], np.float64)
        losses.append(np.log(np.exp(x).sum()) - x[text[row, place]])
    return np.mean(losses)


@pytest.mark.parametrize("end", [END, None])
def test_losses_stay_within_their_documents(end):
    output, text, valid = draw()
    got = text_losses(output, text, valid, end=end)
    logits = (output.text_logits, output.mtp_logits)
    want = [expected(x, text, np.asarray(valid), 1 + i, end) for i, x in enumerate(logits)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert len(text_losses(output._replace(mtp_states=None), text, valid, end=end)) == 1


def test_what_follows_an_end_is_not_counted():
    _, text, valid = draw()
    one, two = counted(text, valid, END)
    assert one[0].tolist() == [1, 1, 0, 0, 1, 1, 0]
    assert two[0].tolist() == [1, 0, 0, 0, 1, 0]
    assert one[1].tolist() == [1, 1, 1, 1, 0, 0, 0] and not one[2].any() and not two[2].any()


def test_without_any_text_the_loss_is_zero():
    output, text, valid = draw()
    assert text_losses(output, text, jnp.zeros_like(valid)) == [0.0, 0.0]


def test_smoothing_and_z_loss_reach_the_loss():
    output, text, valid = draw()
    plain, smooth, squeezed = (
        text_losses(output, text, valid, end=END, **more)[0] for more in ({}, {"smoothing": 0.1}, {"z_loss": 0.1})
    )
    assert smooth != plain and squeezed > plain


@pytest.mark.parametrize(("share", "weight"), [(0.0, 0.3), (0.67, 0.3), (0.68, 0.1), (1.0, 0.1)])
def test_weight_of_mtp_falls_once(share, weight):
    config = TaskConfig(mtp_weight=0.3, mtp_final_weight=0.1, mtp_until=0.68)
    np.testing.assert_allclose(mtp_weight(config, jnp.asarray(share)), weight, rtol=1e-6)
