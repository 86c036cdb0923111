"""Eigenvalues of very many very small matrices on a CUDA device: one thread a matrix, by the code of `eigen.small`.

The threads solve; what is counted of the values is counted on the host, by the code that counts its own. For CUDA 13
numba needs the package numba-cuda[cu13]. No run uses this yet: it was compiled for a device (sm_90) and run in numba's
simulator (NUMBA_ENABLE_CUDASIM=1), but on no device; `bench/slices.py --device cuda` and the tests marked `gpu` do.
"""

from typing import Any

import numba.cuda
import numpy as np
from numba import float64

from stiffcore.eigen import squares as host
from stiffcore.eigen.small import MOST_ORDER, one_spectrum
from stiffcore.eigen.squares import Taken

THREADS = 128
cuda: Any = numba.cuda


@cuda.jit
def _solve(squares: Any, start: int, stop: int, scale: float, eps: float, states: Any, sums: Any, values: Any) -> None:
    at = start + cuda.grid(1)
    if at >= stop:
        return
    a = cuda.local.array((MOST_ORDER, MOST_ORDER), float64)
    re = cuda.local.array(MOST_ORDER, float64)
    im = cuda.local.array(MOST_ORDER, float64)
    three = cuda.local.array(3, float64)
    n, channels = squares.shape[1], squares.shape[3]
    unit, channel = at // channels, at % channels
    for i in range(n):
        for j in range(n):
            a[i, j] = squares[unit, i, j, channel]
    place = at - start
    states[place] = one_spectrum(a, n, scale, eps, three, re, im)
    for i in range(3):
        sums[place, i] = three[i]
    for i in range(n):
        values[place, i, 0] = re[i]
        values[place, i, 1] = im[i]


def take(squares: np.ndarray, start: int, stop: int, scale: float, few: int) -> Taken:
    """As `squares.take`, solved by threads of the device that numba has at hand.

    Memory there: the numbers of the squares, and 8 (n^2 + 2 n + 4) bytes for each of them.
    """
    size, n, channels = stop - start, squares.shape[1], squares.shape[3]
    before = start // channels
    there = cuda.to_device(np.ascontiguousarray(squares[before : -(-stop // channels)]))
    shift = before * channels
    states, sums, values = (cuda.device_array(s, t) for s, t in ((size, "i8"), ((size, 3), "f8"), ((size, n, 2), "f8")))
    eps = float(np.finfo(squares.dtype).eps)
    _solve[-(-size // THREADS), THREADS](there, start - shift, stop - shift, scale, eps, states, sums, values)
    solved = states.copy_to_host(), sums.copy_to_host(), values.copy_to_host()
    return host.take(squares, start, stop, scale, few, solved)
