"""Notes in Chinese and English on generated payments; what is written depends on whether the payment is fraud."""

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int8

SILENT, ORDINARY, VAGUE, ALARMING = range(4)
"""No note, one that says nothing, one that fraud makes likelier, one that hardly comes without fraud."""

WRITTEN = {True: 0.55, False: 0.3}
"""Chance of a note, by whether the payment is fraud."""
KINDS = {True: (0.15, 0.2, 0.65), False: (0.968, 0.03, 0.002)}
"""Chance that a note is ordinary, vague or alarming, likewise."""

_WORDINGS = {
    ORDINARY: (
        "card present, chip and PIN",
        "customer confirmed by phone",
        "regular order, same address as before",
        "cardholder collected the goods with an ID",
        "receipt sent to the registered phone",
        "weekly shopping",
        "持卡人到店，芯片加密码",
        "已电话核实，本人确认",
        "老顾客，地址与以往相同",
        "凭身份证取货",
        "收据已发至预留手机",
        "日常购物",
    ),
    VAGUE: (
        "asked to split the bill over two cards",
        "in a hurry, new delivery address",
        "second try after a declined PIN",
        "goods collected by a friend",
        "要求分两张卡付款",
        "急单，更换收货地址",
        "密码输错后再次尝试",
        "由朋友代取",
    ),
    ALARMING: (
        "customer could not confirm by phone",
        "cardholder says the card is in her purse",
        "terminal seal broken, staff reported it",
        "ID did not match the cardholder",
        "caller does not recognise this shop",
        "已电话核实，本人否认",
        "持卡人称卡未离身",
        "终端封条破损，店员已上报",
        "身份证与持卡人不符",
        "持卡人不认识该商户",
    ),
}


def vague_odds() -> float:
    """How much likelier a vague note is for a fraud whose note does not alarm than for a genuine payment."""
    likely = {fraud: WRITTEN[fraud] * KINDS[fraud][VAGUE - 1] for fraud in (True, False)}
    return likely[True] / (1 - WRITTEN[True] * KINDS[True][ALARMING - 1]) / likely[False]


def draw_notes(rng: np.random.Generator, fraud: Bool[np.ndarray, " N"]) -> tuple[pa.Array, Int8[np.ndarray, " N"]]:
    """Writes the notes of all payments.

    Args:
      rng: Randomness.
      fraud: Which of them are fraud.

    Returns:
      One text each, "" where there is none; and what kind it is (`SILENT` to `ALARMING`).
    """
    written = rng.random(len(fraud)) < np.where(fraud, WRITTEN[True], WRITTEN[False])
    bounds = np.cumsum([KINDS[False], KINDS[True]], axis=1)[fraud.astype(int)]
    kind = ORDINARY + (rng.random(len(fraud))[:, None] >= bounds[:, :2]).sum(axis=1)
    kind = np.where(written, kind, SILENT).astype(np.int8)
    wordings = [w for which in (ORDINARY, VAGUE, ALARMING) for w in _WORDINGS[which]]
    sizes = np.array([len(_WORDINGS[which]) for which in (ORDINARY, VAGUE, ALARMING)])
    first = np.append(0, np.cumsum(sizes))
    which = np.maximum(kind - 1, 0)
    pick = first[which] + (rng.random(len(fraud)) * sizes[which]).astype(int)
    pick = np.where(kind == SILENT, len(wordings), pick)
    return pa.array([*wordings, ""], pa.string()).take(pa.array(pick)), kind
