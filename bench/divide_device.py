"""Does a division on a device give the eigenvalues that its dense solver gives, and what does it take?

A random matrix of order 4,096 (`--quick`: 512), divided in a store into parts of half its order at most, by blocks of
half its columns, on the device (`--device cuda`) or the host; against all eigenvalues at once: the largest distance
from a value of the one to the nearest of the other.
"""

import tempfile
import time

import numpy as np
from common import QUICK, device, distance, stored, workspace, write

from stiffcore.eigen import dense, divide
from stiffcore.eigen.blas import HOST
from stiffcore.eigen.device import device_eigenvalues

K = 512 if QUICK else 4096
PANEL, AT_ONCE, LEAF = K // 4, 2, K // 2


def timed(work):
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def at_once(a):
    if device() == "cpu":
        return dense.hessenberg_eigenvalues(dense.to_hessenberg(a))
    return device_eigenvalues(a, device())


if __name__ == "__main__":
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((K, K)) / np.sqrt(K))
    with tempfile.TemporaryDirectory() as folder:
        space = workspace(folder, PANEL)
        whole = stored(space, "whole", lambda start, stop: a[:, start:stop], K)
        on = {} if device() == "cpu" else {"device": device(), "solve": at_once}
        found, seconds = timed(lambda: divide.eigenvalues(whole, space, LEAF, at_once=AT_ONCE, **{"device": HOST} | on))
    expected, whole_seconds = timed(lambda: at_once(a))
    figures = {"k": K, "panel": PANEL, "at_once": AT_ONCE, "leaf": LEAF, "device": device()}
    figures |= {"divided_s": seconds, "whole_s": whole_seconds, "splits": len(found.splits), "error": found.error}
    write(__file__, figures | {"largest_difference": distance(found.values, expected)})
