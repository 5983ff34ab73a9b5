"""Daily prices of stocks and what was written about them: will the next day bring a large loss?

The public set of StockNet (Xu and Cohen 2018) and folders with its two tables.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from r1jax.data.filesystem import divide_options
from r1jax.data.record_files import is_file, numbers, read_file, times, words
from r1jax.data.records import Records
from r1jax.data.stock_features import GAIN, LOSS, Market, events, price_numbers, tweet_numbers
from r1jax.errors import UserError

PRICES, TWEETS = "prices_raw.parquet", "tweets.parquet"
ENDS = ("2015-08-01", "2015-10-01")
"""First day of the validation and of the test (Xu and Cohen 2018)."""
EARLIER = ("2014-10-01", "2015-01-01", "2015-04-01", "2015-06-01", "2015-08-01")
"""First days of earlier periods, and the last one's end: a fold is one of them, judged by the days before it."""
FIRST = "2014-01-01"
"""First day that is predicted; earlier prices are history alone."""
HISTORY = 60
"""Trading days that must lie before a day that is predicted."""
TEXT_DAYS = 5
"""Trading days whose tweets are read."""
TEXT_CHARS = 4000
"""Characters that are kept of them, the newest first; no model here reads more."""


def read_stocks(path: str) -> Records:
    """Reads a folder of prices and tweets.

    Everything that is known of day d lies before it: prices up to the close of the trading day before, and tweets that
    were written before midnight (UTC) of d.

    Args:
      path: Folder with prices_raw.parquet (ticker, Date, High, Low, Close, Adj Close, Volume) and tweets.parquet
        (ticker, created_at, text).

    Returns:
      One case a stock and day; class 1 is a loss of at least 2.5 %, outcome 2 a gain of as much. One stream of 20
      days, 39 numbers, of which the last 8 are counted in the tweets, and tweets.

    Raises:
      UserError: A file or column is missing, a cell is wrong, or there are not enough days.
    """
    prices, tweets = _files(path)
    market = _market(prices)
    if len(market.days) <= HISTORY + 1:
        raise UserError(f"{path} has {len(market.days)} trading days, but {HISTORY + 2} are needed for the history")
    whole = _whole_history(market)
    whole &= market.days[None] >= np.datetime64(FIRST)
    stock, day = np.nonzero(whole)
    written, counts = _tweets(tweets, market)
    table = np.concatenate([price_numbers(market)[stock, day], counts[stock, day]], axis=-1)
    returns = market.returns[stock, day]
    lost = (returns <= LOSS).astype(np.int32)
    return Records(
        ids=[f"{market.tickers[s]}-{market.days[d]}" for s, d in zip(stock, day, strict=True)],
        label=lost,
        outcome=np.where(returns >= GAIN, np.int32(2), lost),
        table=table.astype(np.float32),
        series=events(market)[stock, day][:, None].astype(np.float32),
        text=[written.get((s, d), "") for s, d in zip(stock.tolist(), day.tolist(), strict=True)],
        day=market.days[day].astype(np.int64).astype(np.int32),
    )


def _files(path: str) -> tuple[str, str]:
    """Where the prices and the tweets lie; a URL's options stay behind."""
    folder, options = divide_options(path)
    prices, tweets = (f"{folder.rstrip('/')}/{name}{options}" for name in (PRICES, TWEETS))
    for file, name in ((prices, PRICES), (tweets, TWEETS)):
        if not is_file(file):
            raise UserError(f"{path} has no file {name}: name a folder of {PRICES} and {TWEETS} by --data.path")
    return prices, tweets


def _market(path: str) -> Market:
    table = read_file(path, ("ticker", "Date", "High", "Low", "Close", "Adj Close", "Volume"))
    names, stock = np.unique(np.array(words(table, "ticker", path), str), return_inverse=True)
    days, day = np.unique(times(table, "Date", path).astype("datetime64[D]"), return_inverse=True)
    place = stock * len(days) + day
    if len(np.unique(place)) < len(place):
        order = np.argsort(place, kind="stable")
        row = int(order[1:][np.diff(place[order]) == 0][0])
        raise UserError(f"{path}: row {row + 1}: {names[stock[row]]} has {days[day[row]]} twice; leave one out")

    def grid(name: str, low: float) -> Float64[np.ndarray, "T D"]:
        cells = np.full((len(names), len(days)), np.nan)
        cells[stock, day] = numbers(table, name, path, low=low)
        return cells

    cent = 1e-6
    close, adjusted = grid("Close", cent), grid("Adj Close", cent)
    returns = np.full_like(close, np.nan)
    returns[:, 1:] = adjusted[:, 1:] / adjusted[:, :-1] - 1
    spread = (grid("High", cent) - grid("Low", cent)) / close
    return Market(names.tolist(), days, returns, spread, grid("Volume", 0.0))


def _whole_history(market: Market) -> np.ndarray:
    """Days with a return of their own, behind `HISTORY` days of them."""
    has = ~np.isnan(market.returns)
    counted = np.cumsum(np.pad(has, ((0, 0), (1, 0))), axis=1)
    whole = np.zeros_like(has)
    whole[:, HISTORY:] = has[:, HISTORY:] & (counted[:, HISTORY:-1] - counted[:, : -HISTORY - 1] == HISTORY)
    return whole


def _tweets(path: str, market: Market) -> tuple[dict[tuple[int, int], str], Float64[np.ndarray, "T D 8"]]:
    """By stock and day, what was written in the five trading days before, the newest first, and counts."""
    table = read_file(path, ("ticker", "created_at", "text"))
    number = {name: i for i, name in enumerate(market.tickers)}
    stock = np.array([number.get(name, -1) for name in words(table, "ticker", path)], np.int64)
    said = [text or "" for text in table["text"].cast(pa.string()).to_pylist()]
    written = times(table, "created_at", path).astype("datetime64[us]")
    rows = np.argsort(written, kind="stable")[::-1]
    rows = rows[[stock[row] >= 0 and said[row] != "" for row in rows]]
    # Read on day d if days[d - 5] <= written < days[d].
    first = np.searchsorted(market.days.astype("datetime64[us]"), written, side="right")
    found: dict[tuple[int, int], list[str]] = {}
    for row in rows.tolist():
        for day in range(first[row], min(first[row] + TEXT_DAYS, len(market.days))):
            found.setdefault((int(stock[row]), day), []).append(said[row])
    hour = written.astype("datetime64[h]").astype(np.int64) % 24
    counts = tweet_numbers(
        market.returns.shape, stock[rows], first[rows], hour[rows], [said[row] for row in rows.tolist()]
    )
    return {key: " / ".join(parts)[:TEXT_CHARS] for key, parts in found.items()}, counts
