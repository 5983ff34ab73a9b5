"""Small files in the formats of the records task, with something to learn in each."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY_S = 86400


def credit_columns(rows=80, seed=0) -> dict[str, np.ndarray]:
    """Clients who miss a payment if they were late before, mostly."""
    rng = np.random.default_rng(seed)
    columns = {"ID": np.arange(1, rows + 1), "X1": rng.choice([20000.0, 100000.0, 300000.0], rows)}
    columns |= {f"X{i}": rng.integers(1, 3, rows) for i in (2, 3, 4)} | {"X5": rng.integers(21, 70, rows)}
    columns |= {f"X{i}": rng.integers(-2, 4, rows) for i in range(6, 12)}
    columns |= {f"X{i}": np.round(rng.uniform(-500, 60000, rows)) for i in range(12, 18)}
    columns |= {f"X{i}": np.round(rng.uniform(0, 9000, rows)) for i in range(18, 24)}
    late = columns["X6"] > 0
    columns["Y"] = np.where(rng.random(rows) < 0.9, late, ~late).astype(np.int64)
    return columns


def write_credit(path: Path, **changes: np.ndarray) -> Path:
    """A file of clients; a change of None leaves a column out."""
    columns = {k: v for k, v in (credit_columns() | changes).items() if v is not None}
    pq.write_table(pa.table(columns), path)
    return path


def write_phrases(path: Path, sentences=60, seed=0) -> Path:
    """Sentences whose verb is their label."""
    rng = np.random.default_rng(seed)
    verbs = {"positive": "rose to", "neutral": "is", "negative": "fell to"}
    labels = rng.choice(list(verbs), sentences)
    lines = [f"Net sales of plant {i} {verbs[x]} EUR {i}.5 mn @home@{x}" for i, x in enumerate(labels)]
    path.write_text("\n".join([*lines, lines[0]]) + "\n", "utf-8")
    return path


def write_agreement(folder: Path) -> Path:
    """Three files of one PhraseBank: the name in the first sentence is broken in two ways; one label is missing."""
    files = {
        "50": (
            "Lemmink+\ufffdinen 's profit rose@positive\nSales fell@negative\nOrders rose@positive\n"
            "Sales are flat@neutral\nNobody knows@\nIt opened a shop@neutral\n"
        ),
        "75": "Lemmink+\ufffdinen 's profit rose@positive\nOrders rose@positive\nSales fell@negative\n",
        "All": "Lemmink+ñinen 's profit rose@positive\n",
    }
    for level, text in files.items():
        (folder / f"Sentences_{level}Agree.txt").write_text(text, "utf-8")
    return folder


def write_stocks(folder: Path, days=420, seed=0) -> Path:
    """Prices of three stocks from April 2014 on, and tweets; the third stock lacks a day."""
    rng = np.random.default_rng(seed)
    calendar = np.busday_offset("2014-04-01", np.arange(days)).astype("datetime64[us]")
    returns = 0.02 * rng.standard_normal((3, days))
    close = 50 * np.exp(np.cumsum(returns, axis=1))
    here = np.ones((3, days), bool)
    here[2, 200] = False
    stock, day = np.nonzero(here)
    prices = {"ticker": np.array(["AA", "BB", "CC"])[stock], "Date": calendar[day]}
    for name, factor in (("High", 1.01), ("Low", 0.98), ("Close", 1.0), ("Adj Close", 0.9)):
        prices[name] = factor * close[stock, day]
    prices["Volume"] = rng.uniform(1e6, 2e6, len(stock))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(prices), folder / "prices_raw.parquet")
    written = calendar[rng.integers(70, days, 200)] + rng.integers(0, DAY_S, 200).astype("timedelta64[s]")
    times = pa.array(written.astype("datetime64[us]")).cast(pa.timestamp("us", "UTC"))
    said = [f"tweet {i} on $ {name}" for i, name in enumerate(rng.choice(["AA", "BB"], 200))]
    tickers = [text[-2:] for text in said]
    pq.write_table(pa.table({"ticker": tickers, "created_at": times, "text": said}), folder / "tweets.parquet")
    return folder
