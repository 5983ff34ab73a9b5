"""Numbers that tell how much a stock is about to move, each from days that lie before the day they are given for.

A large loss is a large move first of all, and moves are told by how much the stock moved over a day to a year, by
how long ago its quarterly figures came, and by what is written about it.
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

EVENTS = 20
"""Days before each that the model reads one by one."""
LOSS = -0.025
"""A return of at most this is a large loss."""
GAIN = 0.025
"""A return of at least this is a large gain."""
WINDOWS = (5, 20, 60, 250)
"""Trading days over which moves are averaged; of a stock with fewer, all that there are."""
QUARTERS = (63, 126, 189, 252)
"""Trading days after which quarterly figures come again."""
STILL = 0.002
"""Added to a volatility before its logarithm, as stocks may be suspended."""
COUNT_DAYS = (1, 5, 20)
"""Trading days over which tweets are counted."""
COUNTS = 8
"""Numbers from tweets."""
RESULTS = re.compile(r"\b(?:earnings?|eps|results|quarter(?:s|ly)?)\b", re.IGNORECASE)
"""A tweet with one of these words is about figures; steps and headquarters are not."""
CLOSED_HOUR = 20
"""From this hour on (UTC), New York is closed or about to: figures that come out then move the next day."""


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


def _before(x: Float64[np.ndarray, "T D"], lag: int) -> Float64[np.ndarray, "T D"]:
    """The value of `lag` trading days before."""
    moved = np.full_like(x, np.nan)
    moved[:, lag:] = x[:, :-lag]
    return moved


def _sums(x: Float64[np.ndarray, "T D"], days: int) -> Float64[np.ndarray, "T D"]:
    """Sum over each day and the days before it, `days` in all or as many as there are."""
    total = np.cumsum(x, axis=1)
    total[:, days:] -= total[:, :-days].copy()
    return total


def _mean_before(x: Float64[np.ndarray, "T D"], days: int) -> Float64[np.ndarray, "T D"]:
    """Mean of the known values of the `days` trading days before; NaN where none is known."""
    known = _sums((~np.isnan(x)).astype(np.float64), days)
    total = np.where(known > 0, _sums(np.nan_to_num(x), days), np.nan)
    return _before(total / np.maximum(known, 1), 1)


def _across(x: Float64[np.ndarray, "T D"]) -> Float64[np.ndarray, "T D"]:
    """Mean over the stocks that have a value that day, for each of them."""
    known = ~np.isnan(x)
    total = np.where(known.any(axis=0), np.nansum(x, axis=0), np.nan)
    return np.broadcast_to(total / np.maximum(known.sum(axis=0), 1), x.shape)


def _volume_ratio(market: Market) -> Float64[np.ndarray, "T D"]:
    """Logarithm of the volume against the mean of the 20 days before."""
    return np.log((market.volume + 1) / (_mean_before(market.volume, 20) + 1))


def events(market: Market) -> Float64[np.ndarray, "T D K 4"]:
    """Return, spread, volume against its 20 days, and the market's mean return, of the last days before each.

    Args:
      market: Prices.

    Returns:
      Numbers of order one, the latest day last; 0 where unknown.
    """
    daily = (
        40 * market.returns,
        40 * market.spread - 1,
        _volume_ratio(market),
        80 * _across(market.returns),
    )
    windows = [np.stack([_before(x, lag) for lag in range(EVENTS, 0, -1)], axis=-1) for x in daily]
    return np.clip(np.nan_to_num(np.stack(windows, axis=-1)), -4, 4)


def price_numbers(market: Market) -> Float64[np.ndarray, "T D F"]:
    """How much the stock moved over a day to a year, when it was last in the news, and the market's last days.

    Args:
      market: Prices.

    Returns:
      31 numbers of order one; 0 where the past does not reach.
    """
    squares = np.square(market.returns), np.square(np.minimum(market.returns, 0))
    columns = [_log_root(_mean_before(np.square(market.spread), days)) for days in (1, *WINDOWS)]
    columns += [_log_root(_mean_before(x, days)) for x in squares for days in WINDOWS]
    lost = np.where(np.isnan(market.returns), np.nan, market.returns <= LOSS)
    columns += [np.log(_mean_before(lost, days) + 0.005) + 4 for days in WINDOWS]
    stir = _stir(market)
    columns += [_largest(stir, quarter - near, quarter + near) for quarter in QUARTERS for near in (1, 4)]
    columns += [_largest(stir, 1, last) for last in (1, 10, 40)]
    columns.append(_before(_volume_ratio(market), 1))
    columns.append(_log_root(np.square(_before(_across(market.spread), 1))))
    columns.append(200 * _mean_before(_across(market.returns), 5))
    return np.clip(np.nan_to_num(np.stack(columns, axis=-1)), -6, 6)


def _log_root(square: Float64[np.ndarray, "T D"]) -> Float64[np.ndarray, "T D"]:
    """Logarithm of a volatility of about 2 %, from its square."""
    return 2 * np.log(np.sqrt(np.maximum(square, 0)) + STILL) + 8  # a difference of sums may be rounded below 0


def _stir(market: Market) -> Float64[np.ndarray, "T D"]:
    """Size of the day's move and of its volume against those before: quarterly figures make both large."""
    usual = np.sqrt(np.maximum(_mean_before(np.square(market.returns), 60), 0)) + STILL
    volume = np.exp(np.minimum(_volume_ratio(market), 2))
    return np.minimum(np.abs(market.returns) / usual, 6) / 2 + np.minimum(volume, 5) - 1.5


def _largest(x: Float64[np.ndarray, "T D"], first: int, last: int) -> Float64[np.ndarray, "T D"]:
    """The largest known value of `first` to `last` trading days before; NaN where none is known."""
    return np.fmax.reduce([_before(x, lag) for lag in range(first, last + 1)])


def tweet_numbers(
    shape: tuple[int, int], stock: np.ndarray, day: np.ndarray, hour: np.ndarray, said: list[str]
) -> Float64[np.ndarray, "T D 8"]:
    """How much was written, lately against usually, after the close, and about figures.

    Args:
      shape: Number of stocks and of days.
      stock: Of each tweet.
      day: The first day that lies behind each tweet, at most the number of days.
      hour: Of each tweet, UTC.
      said: Text of each.

    Returns:
      `COUNTS` numbers of order one.
    """
    figures = np.array([RESULTS.search(text) is not None for text in said], bool)
    everything, late, about = (np.zeros(shape) for _ in range(3))
    inside = day < shape[1]
    for grid, chosen in ((everything, inside), (late, inside & (hour >= CLOSED_HOUR)), (about, inside & figures)):
        np.add.at(grid, (stock[chosen], day[chosen]), 1)
    many = [np.log1p(_sums(everything, days)) for days in COUNT_DAYS]
    usual = np.log1p(_sums(everything, COUNT_DAYS[-1]) / COUNT_DAYS[-1])
    columns = [*many, many[0] - usual, np.log1p(late), *(np.log1p(_sums(about, days)) for days in COUNT_DAYS)]
    return np.stack(columns, axis=-1) - 1
