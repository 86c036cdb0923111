"""The eigenvalues of very many small squares on the host, and all that is asked of them, in one compiled pass."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from stiffcore.eigen.compiled import compiled
from stiffcore.eigen.small import DOUBTFUL, MOST_ORDER, ZERO, one_spectrum
from stiffcore.metrics import HISTOGRAM_EDGES

# What take_spectra() counts, sums and keeps of ends, by position.
COUNTED = ("found", "negative", "positive", "inside", "doubtful")
SUMMED = ("values", "squares", "trace", "trace_square", "norm_square", "modulus_square")
ENDS = ("max_re", "-min_re", "radius", "im", "slowest", "-step")
# The least power of two that a histogram's edges are looked up by.
FIRST_EXPONENT = -60


@compiled
def _bin_of(x: float, edges: Any, of_exponent: Any) -> int:
    """The bin of a histogram, a bin without its right edge, from that of the power of two below |x|."""
    at = 0
    if x != 0.0:
        bits: Any = np.float64(x).view(np.int64)
        exponent = (bits >> 52 & 0x7FF) - 1022
        at = min(max(exponent - FIRST_EXPONENT, 0), len(of_exponent) - 1)
    i = of_exponent[at]
    if x < 0.0:
        i = len(edges) - 2 - i
    while x >= edges[i + 1]:
        i += 1
    while x < edges[i]:
        i -= 1
    return i


@compiled
def _put_end(values: Any, places: Any, key: float, re: float, im: float, place: int) -> None:
    """Insert an eigenvalue among the few whose key is least."""
    k = len(places) - 1
    while k > 0 and key < values[k - 1, 0]:
        values[k] = values[k - 1]
        places[k] = places[k - 1]
        k -= 1
    values[k, 0], values[k, 1], values[k, 2], places[k] = key, re, im, place


@compiled
def take_spectra(
    squares: Any,
    start: int,
    stop: int,
    scale: float,
    eps: float,
    solved: Any,
    work: Any,
    found: Any,
    doubtful: Any,
    counts: Any,
    sums: Any,
    ends: Any,
    few: Any,
    few_places: Any,
    histogram: Any,
    edges: Any,
    of_exponent: Any,
) -> None:
    """The eigenvalues of some of very many squares, and all that is asked of them, in one pass.

    What is doubtful is not counted anywhere but in `doubtful`.

    Args:
        squares: (a, n, n, c) float32 or float64: number by number, as they come.
        start: the first, as an index into the a x c of them.
        stop: after the last.
        scale: the largest entry that they were summed from.
        eps: of their numbers.
        solved: of each what `one_spectrum` says, its three sums, and its real and imaginary parts, where a device has
            found them: (stop - start,) int64, (stop - start, 3) and (stop - start, n, 2) float64. Empty: all is found
            here.
        work: (11, 8) float64.
        found: ((stop - start) n, 2) in their precision, gets real and imaginary parts of eigenvalues that are not 0.
        doubtful: (stop - start,) int64, gets their indices.
        counts: (5,) int64, see `COUNTED`.
        sums: (6,) float64, see `SUMMED`.
        ends: (6,) float64, largest ones so far, see `ENDS`.
        few: (2, b, 3) float64, keys, real and imaginary parts of those furthest to the right, and to the left.
        few_places: (2, b) int64, the squares they are of; -1: none.
        histogram: (bins,) int64, how many real parts lie in each bin.
        edges: (bins + 1,) its edges, the outermost ones infinite, symmetric to 0.
        of_exponent: int64, the bin of 2^e / 2, by e - `FIRST_EXPONENT`; the first of them that of 0.
    """
    n, channels = squares.shape[1], squares.shape[3]
    re, im, three = work[8], work[9], work[10]
    states, all_sums, values = solved
    count = 0
    for at in range(start, stop):
        if len(states):
            state = states[at - start]
            three[:3] = all_sums[at - start]
            re[:n], im[:n] = values[at - start, :, 0], values[at - start, :, 1]
        else:
            unit, channel = at // channels, at % channels
            for i in range(n):
                for j in range(n):
                    work[i, j] = squares[unit, i, j, channel]
            state = one_spectrum(work, n, scale, eps, three, re, im)
        if state == ZERO:
            continue
        if state == DOUBTFUL:
            doubtful[counts[4]] = at
            counts[4] += 1
            continue
        for k in range(3):
            sums[2 + k] += three[k]
        for k in range(n):
            found[count, 0], found[count, 1] = re[k], im[k]
            x, y = float(found[count, 0]), float(found[count, 1])
            if x == 0.0 and y == 0.0:
                continue
            count += 1
            modulus = x * x + y * y
            sums[0] += x
            sums[1] += x * x - y * y
            sums[5] += modulus
            outside = modulus + 2.0 * x
            if abs(outside) < 1e-12:
                outside = math.hypot(1.0 + x, y) - 1.0
            if outside <= 0.0:
                counts[3] += 1
            if x < 0.0:
                counts[1] += 1
                ends[4] = max(ends[4], x)
                if 2.0 * x > ends[5] * modulus:
                    ends[5] = max(ends[5], 2.0 * (x / modulus))
            elif x > 0.0:
                counts[2] += 1
            ends[0], ends[1] = max(ends[0], x), max(ends[1], -x)
            ends[2], ends[3] = max(ends[2], modulus), max(ends[3], abs(y))
            histogram[_bin_of(x, edges, of_exponent)] += 1
            for end in range(2):
                key = x if end else -x
                if few_places[end, -1] < 0 or key < few[end, -1, 0]:
                    _put_end(few[end], few_places[end], key, x, y, at)
    counts[0] += count


@compiled
def largest_entry(squares: Any) -> float:
    """The largest modulus in some squares, as `take_spectra` has them; nan where one is not finite."""
    most = nothing = 0.0
    for i in range(squares.shape[0]):
        for j in range(squares.shape[1]):
            for k in range(squares.shape[2]):
                for c in range(squares.shape[3]):
                    x = float(squares[i, j, k, c])
                    most = max(most, abs(x))
                    nothing += x - x
    return most + nothing


_NOTHING = np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros((0, 1, 2))


@dataclass(frozen=True)
class Taken:
    """What `take_spectra` found in some squares, but for the doubtful ones.

    Attributes:
        values: (m,) complex, the eigenvalues that are not 0.
        doubtful: (d,) indices of squares that are left to the caller.
        counts: by name, see `COUNTED`.
        ends: by name, those of `ENDS` that there are; and `modulus_square`, the sum of |l|^2.
        sums: (4,) of the values, of their squares (both real), and the traces that these must be.
        norm: Frobenius norm of all squares together.
        few: for `right` and `left`, the eigenvalues furthest there, each with its square's index.
        histogram: how many real parts are in each bin of `HISTOGRAM_EDGES`.
    """

    values: np.ndarray
    doubtful: np.ndarray
    counts: dict[str, int]
    ends: dict[str, float]
    sums: np.ndarray
    norm: float
    few: dict[str, list[tuple[complex, int]]]
    histogram: np.ndarray


def take(
    squares: np.ndarray,
    start: int,
    stop: int,
    scale: float,
    few: int,
    solved: tuple[np.ndarray, np.ndarray, np.ndarray] = _NOTHING,
) -> Taken:
    """The eigenvalues of some squares, and what is counted of them, on the host.

    Args:
        squares: (a, n, n, c) float32 or float64, n at most `MOST_ORDER`.
        start: the first, as an index into the a x c of them.
        stop: after the last.
        scale: the largest entry of what they are parts of, to which their numbers are rounded.
        few: how many eigenvalues to keep with their squares, at either end.
        solved: as for `take_spectra`.
    """
    n, size = squares.shape[1], stop - start
    found, doubtful = np.empty((size * n, 2), squares.dtype), np.empty(size, np.int64)
    counts, sums, ends = np.zeros(len(COUNTED), np.int64), np.zeros(len(SUMMED)), np.full(len(ENDS), -np.inf)
    furthest, places = np.zeros((2, few, 3)), np.full((2, few), -1)
    histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)
    eps = float(np.finfo(squares.dtype).eps)
    work = np.zeros((MOST_ORDER + 3, MOST_ORDER))
    parts = (found, doubtful, counts, sums, ends, furthest, places, histogram, HISTOGRAM_EDGES, _BINS)
    take_spectra(squares, start, stop, scale, eps, solved, work, *parts)
    ends[2] = math.sqrt(max(ends[2], 0.0))
    named = {name: float(value) for name, value in zip(ENDS, ends, strict=True) if value > -math.inf}
    return Taken(
        values=found[: counts[0]].reshape(-1).view(np.result_type(squares.dtype, np.complex64)),
        doubtful=doubtful[: counts[4]],
        counts={name: int(count) for name, count in zip(COUNTED, counts, strict=True)},
        ends=named | {"modulus_square": float(sums[5])},
        sums=sums[:4],
        norm=math.sqrt(sums[4]),
        few={
            name: [(complex(*furthest[i, k, 1:]), int(places[i, k])) for k in range(few) if places[i, k] >= 0]
            for i, name in enumerate(("right", "left"))
        },
        histogram=histogram,
    )


def bins_by_exponent(edges: np.ndarray) -> np.ndarray:
    """The bin of each power of two, as `take_spectra` looks it up."""
    last = int(math.frexp(edges[-2])[1]) + 1
    powers = 0.5 * 2.0 ** np.arange(FIRST_EXPONENT, last)
    powers[0] = 0.0
    return np.searchsorted(edges, powers, side="right") - 1


_BINS = bins_by_exponent(HISTOGRAM_EDGES)
