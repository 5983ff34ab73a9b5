"""Daily prices of stocks and what was written about them: will the next day bring a large loss?

The public set of StockNet (Xu and Cohen 2018) and folders with its two tables.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from r1jax.data.filesystem import is_remote
from r1jax.data.record_files import is_file, numbers, read_file, times, words
from r1jax.data.records import Records
from r1jax.errors import UserError

PRICES, TWEETS = "prices_raw.parquet", "tweets.parquet"
ENDS = ("2015-08-01", "2015-10-01")
"""First day of the validation and of the test (Xu and Cohen 2018)."""
FIRST = "2014-01-01"
"""First day that is predicted; earlier prices are history alone."""
LOSS = -0.025
"""A return of at most this is a large loss."""
HISTORY = 60
"""Trading days that must lie before a day that is predicted."""
EVENTS = 20
"""Of them, those that the model reads one by one."""
TEXT_DAYS = 5
"""Trading days whose tweets are read."""
TEXT_CHARS = 4000
"""Characters that are kept of them, the newest first; no model here reads more."""


class Market(NamedTuple):
    """Prices of all stocks on one calendar of trading days, NaN where a stock has none."""

    tickers: list[str]
    days: np.ndarray
    """datetime64[D], ascending."""
    returns: Float64[np.ndarray, "T D"]
    """Of the adjusted close, from the trading day before."""
    spread: Float64[np.ndarray, "T D"]
    """(high - low) / close."""
    volume: Float64[np.ndarray, "T D"]


def read_stocks(path: str) -> Records:
    """Reads a folder of prices and tweets.

    Everything that is known of day d lies before it: prices up to the close of the trading day before, and tweets that
    were written before midnight (UTC) of d.

    Args:
      path: Folder with prices_raw.parquet (ticker, Date, High, Low, Close, Adj Close, Volume) and tweets.parquet
        (ticker, created_at, text).

    Returns:
      One case a stock and day; class 1 is a loss of at least 2.5 %. One stream of 20 days, 21 numbers, and tweets.

    Raises:
      UserError: A file or column is missing, a cell is wrong, or there are not enough days.
    """
    prices, tweets = _files(path)
    market = _market(prices)
    if len(market.days) <= HISTORY + 1:
        raise UserError(f"{path} has {len(market.days)} trading days, but {HISTORY + 2} are needed for the history")
    features, events = _features(market), _events(market)
    whole = _whole_history(market)
    whole &= market.days[None] >= np.datetime64(FIRST)
    stock, day = np.nonzero(whole)
    written = _tweets(tweets, market)
    return Records(
        ids=[f"{market.tickers[s]}-{market.days[d]}" for s, d in zip(stock, day, strict=True)],
        label=(market.returns[stock, day] <= LOSS).astype(np.int32),
        table=features[stock, day].astype(np.float32),
        series=events[stock, day][:, None].astype(np.float32),
        text=[written.get((s, d), "") for s, d in zip(stock.tolist(), day.tolist(), strict=True)],
        day=market.days[day].astype(np.int64).astype(np.int32),
    )


def _files(path: str) -> tuple[str, str]:
    """Where the prices and the tweets lie; a URL's options stay behind."""
    folder, mark, options = path.partition("?") if is_remote(path) else (path, "", "")
    prices, tweets = (f"{folder.rstrip('/')}/{name}{mark}{options}" for name in (PRICES, TWEETS))
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


def _before(x: Float64[np.ndarray, "T D"], lag: int) -> Float64[np.ndarray, "T D"]:
    """The value of `lag` trading days before."""
    moved = np.full_like(x, np.nan)
    moved[:, lag:] = x[:, :-lag]
    return moved


def _window(x: Float64[np.ndarray, "T D"], days: int) -> Float64[np.ndarray, "T D days"]:
    """The values of the `days` trading days before each, the latest last."""
    return np.stack([_before(x, lag) for lag in range(days, 0, -1)], axis=-1)


def _daily(market: Market) -> list[np.ndarray]:
    """Return, spread, volume against its 20 days, and the market's mean return, of each day, of order one."""
    recent = np.stack([market.volume, *(_before(market.volume, lag) for lag in range(1, 20))], axis=-1)
    usual = np.full_like(market.volume, np.nan)
    known = ~np.isnan(recent).any(axis=-1)
    usual[known] = recent[known].mean(axis=-1)
    ratio = np.log((market.volume + 1) / (usual + 1))
    everyone = np.full(len(market.days), np.nan)
    traded = ~np.isnan(market.returns).all(axis=0)
    everyone[traded] = np.nanmean(market.returns[:, traded], axis=0)
    return [
        40 * market.returns,
        40 * market.spread - 1,
        np.nan_to_num(ratio),
        np.broadcast_to(80 * everyone, market.returns.shape),
    ]


def _events(market: Market) -> Float64[np.ndarray, "T D K 4"]:
    """The last `EVENTS` days before each; what is unknown is 0, and cases without whole history are not used."""
    daily = [_window(x, EVENTS) for x in _daily(market)]
    return np.clip(np.nan_to_num(np.stack(daily, axis=-1)), -4, 4)


def _features(market: Market) -> Float64[np.ndarray, "T D F"]:
    """The last five returns, the last day, the market, and spread, sum and worst of the returns over 5, 20, 60 days."""
    own, spread, volume, everyone = _daily(market)
    columns = [_before(own, lag) for lag in range(1, 6)]
    columns += [_before(spread, 1), _before(volume, 1), _before(everyone, 1)]
    columns.append(2 * np.log(_deviation(_window(everyone, 5))))
    for days in (5, 20, HISTORY):
        past = _window(own, days)
        columns += [2 * np.log(_deviation(past)), past.sum(axis=-1) / days**0.5, past.min(axis=-1)]
    columns.append(_window(spread, 20).mean(axis=-1))
    columns.append(_deviation(_window(everyone, 20)))
    weekday = (market.days.astype(np.int64) + 3) % 7  # Monday is 0
    columns.append(np.broadcast_to((weekday - 2.0)[None], own.shape))
    return np.clip(np.stack(columns, axis=-1), -6, 6)


def _deviation(x: Float64[np.ndarray, "T D days"]) -> Float64[np.ndarray, "T D"]:
    """Standard deviation, not below one hundredth of what is usual, as stocks may be suspended."""
    return np.maximum(x.std(axis=-1), 0.01)


def _tweets(path: str, market: Market) -> dict[tuple[int, int], str]:
    """By stock and day, what was written in the five trading days before, the newest first."""
    table = read_file(path, ("ticker", "created_at", "text"))
    number = {name: i for i, name in enumerate(market.tickers)}
    written, said = times(table, "created_at", path), table["text"].cast(pa.string()).to_pylist()
    tickers = words(table, "ticker", path)
    days = market.days.astype("datetime64[us]")
    found: dict[tuple[int, int], list[str]] = {}
    for row in np.argsort(written, kind="stable")[::-1]:
        stock = number.get(tickers[row])
        if stock is None or not said[row]:
            continue
        # Read on day d if days[d - 5] <= written < days[d].
        first = int(np.searchsorted(days, written[row], side="right"))
        for day in range(first, min(first + TEXT_DAYS, len(days))):
            found.setdefault((stock, day), []).append(said[row])
    return {key: " / ".join(parts)[:TEXT_CHARS] for key, parts in found.items()}
