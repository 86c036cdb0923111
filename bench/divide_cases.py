"""Does a division find the eigenvalues of real and of hard matrices, and does it say where it cannot?

Reduced matrices of ResNet blocks (bundled weights, the first sample image), in parts of a fifth of their order, beside
LAPACK's eigenvalues of the whole; and matrices of order 256 whose spectra are known exactly, random ones and
Grcar's, in parts of 64. A division claims that its eigenvalues are those of a matrix that is no further away than what
it neglected: for each of the hard ones the smallest singular value of A - z I must be no larger than that, but for
rounding (4 n eps |A|), at every z found. It claims how many eigenvalues lie right of the first line, too. *right*: both
claims hold; *count off*: eigenvalues within what is neglected times their condition, or 1e-10 |A|, of the line were
counted on its other side, so that a certificate would have to say so; *refused*: it says that no curve divides the
matrix, or a part of it; *silently wrong*: none of these. `--quick` takes every fourth hard matrix and the smallest
block.
"""

import math
import tempfile

import numpy as np
import scipy.linalg
from common import QUICK, block_calls, distance, stored, workspace, write
from threadpoolctl import threadpool_limits

from stiffcore.eigen import divide
from stiffcore.eigen.divide import DivisionError
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.unit import sparse_matrix

BLOCKS = [("resnet18", "layer4.1"), ("resnet18", "layer3.1"), ("resnet50", "layer3.1"), ("resnet50", "layer3.5")]
EPS = np.finfo(float).eps
N = 256
RNG = np.random.default_rng(0)
# Orthogonal, and as all numbers below have few binary digits, A = Q T Q^T is exact: its eigenvalues are T's.
Q = scipy.linalg.hadamard(N)[RNG.permutation(N)] * RNG.choice([-1, 1], N) / 16


def turned(*blocks, above=0.0):
    """Q T Q^T, T of real blocks of order 1 or 2 and, above them, random sixteenths times `above`; and its spectrum."""
    t = scipy.linalg.block_diag(*blocks)
    assert len(t) == N
    values = np.concatenate([np.linalg.eigvals(np.atleast_2d(b)) for b in blocks]).astype(complex)
    inside = scipy.linalg.block_diag(*(np.ones_like(np.atleast_2d(b)) for b in blocks))
    t = t + above * np.triu(RNG.integers(-16, 17, (N, N)) / 16, 1) * (1 - inside)
    return Q @ t @ Q.T, values


def spread(count, low=0.5, high=3.0):
    """Evenly, rounded to 12 binary digits."""
    return list(np.round(np.linspace(low, high, count) * 4096) / 4096)


def rotation(re, im):
    return np.array([[re, -im], [im, re]])


def defective(value, size):
    """A Jordan block of this size among well separated eigenvalues."""
    a, values = turned(*[value] * size, *spread(N - size, 1.0))
    t = Q.T @ a @ Q
    t[np.arange(size - 1), np.arange(1, size)] = 1.0
    return Q @ t @ Q.T, values


def toeplitz(below):
    """Eigenvalues 2 sqrt(below) cos(j pi / (n + 1)); the further from normal, the smaller `below`."""
    a = np.diag(np.full(N - 1, below), -1) + np.eye(N, k=1)
    return a, 2 * math.sqrt(below) * np.cos(np.arange(1, N + 1) * np.pi / (N + 1)) + 0j


def cases():
    plain = spread(N)
    yield "well separated, normal", *turned(*plain)
    for above in (2.0**-6, 2.0**-4, 2.0**-2, 1.0):
        yield f"well separated, not normal: {above:g} above the diagonal", *turned(*plain, above=above)
    pairs = [rotation(x, 2.0 * x) for x in spread(N // 2)]
    yield "pairs", *turned(*pairs)
    yield "pairs, not normal", *turned(*pairs, above=2.0**-4)
    for size in (2, 3, 6, 12):
        yield f"defective at the left end, Jordan block of {size}", *defective(0.5, size)
    for size in (2, 4):
        yield f"defective at 0, Jordan block of {size}", *defective(0.0, size)
    for below in (2.0**-2, 2.0**-6, 2.0**-14):
        a, values = toeplitz(below)
        yield f"Toeplitz, {below:.0e} below the diagonal, half left of 0", a, values
        yield f"Toeplitz, {below:.0e} below the diagonal, moved right", a + 3 * np.eye(N), values + 3
    yield "a rotation: every real part 0", *turned(*[rotation(0.0, f) for f in spread(N // 2)])
    for digits in (10, 20, 30, 40):
        x = 2.0**-digits
        yield f"two at +-{x:.0e} of 0", *turned(-x, x, *spread(N - 2))
        yield f"three {x:.0e} left of 0", *turned(-x, -2 * x, -3 * x, *spread(N - 3))
        yield f"two at +-{x:.0e} of 0, not normal", *turned(-x, x, *spread(N - 2), above=2.0**-6)
    yield "one at 0", *turned(0.0, *spread(N - 1))
    yield "ten at 0", *turned(*[0.0] * 10, *spread(N - 10))
    for power in (-500, -100, 100, 500):
        a, values = turned(*plain)
        yield f"norm 2^{power}", a * 2.0**power, values * 2.0**power
    a, values = turned(*plain)
    scale = 2.0 ** RNG.integers(-20, 20, N)
    yield "badly scaled by a diagonal", a * scale[:, None] / scale[None, :], values
    graded = 2.0 ** np.linspace(0, 40, N).round()
    yield "graded, triangular", np.triu(np.ones((N, N))) * graded[None, :], graded + 0j
    yield "a cluster of 128 pairs within 1e-6", *turned(*[rotation(1 + 2.0**-27 * j, 0.5) for j in range(N // 2)])
    yield "one eigenvalue, 256 times", *turned(*[2.0] * N)
    yield "one eigenvalue, 256 times, not normal", *turned(*[2.0] * N, above=2.0**-4)
    yield "zero", np.zeros((N, N)), np.zeros(N, complex)


def divided(a, leaf, panel, at_once, first=0.0):
    """The division of a, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        space = workspace(folder, panel)
        whole = stored(space, "whole", lambda start, stop: a[:, start:stop], len(a))
        try:
            return divide.eigenvalues(whole, space, leaf, first=first, at_once=at_once)
        except DivisionError as error:
            return str(error)


def figures(found, size):
    good = [s for s in found.splits if not s.failure]
    return {
        "divisions": sum(0 < s.beyond < s.order for s in good),
        "tried": len(found.splits),
        "steps": [s.steps for s in good],
        "trace_error": max((s.trace_error for s in good), default=0.0),
        "neglected": float(found.error / size) if size else 0.0,
    }


def real(network, block):
    call = block_calls(network)[block]
    reduction = reduce_jacobian(call.function, call.x)
    a = sparse_matrix(reduction, 256).toarray()
    k, size = reduction.k, np.linalg.norm(a)
    found = divided(a, k // 5, 128, 4, first=-float(reduction.shift))
    values = scipy.linalg.eigvals(a)
    row = {"matrix": f"{network} {block}", "order": k}
    if isinstance(found, str):
        return row | {"verdict": "refused", "why": found}
    away = distance(values, found.values) / np.abs(values).max()
    return row | figures(found, size) | {"distance": away, "verdict": "right" if away < 1e-8 else "silently wrong"}


def hard():
    yield from cases()
    rng = np.random.default_rng(1)
    for name, a in {
        "random": rng.standard_normal((N, N)) / 16,
        "random, moved left by half its radius": rng.standard_normal((N, N)) / 16 - 0.5 * np.eye(N),
        "Grcar": np.triu(np.tril(np.ones((N, N)), 3)) - np.diag(np.ones(N - 1) * 2, -1),
        "block diagonal, blocks of 4": scipy.linalg.block_diag(*rng.standard_normal((N // 4, 4, 4))),
    }.items():
        yield name, a, scipy.linalg.eigvals(a)


def judged(name, a, values):
    row, size = {"matrix": name, "order": N}, np.linalg.norm(a)
    found = divided(a, 64, 128, 1)
    if isinstance(found, str):
        return row | {"verdict": "refused", "why": found.split(": ", 1)[0]}
    row |= figures(found, size)
    row["distance"] = distance(values, found.values) / (np.abs(values).max() or 1.0)
    row["lapack_distance"] = distance(values, scipy.linalg.eigvals(a)) / (np.abs(values).max() or 1.0)
    backward = max(np.linalg.svd(a - z * np.eye(N), compute_uv=False)[-1] for z in found.values)
    row["backward"] = float(backward / size) if size else 0.0
    if backward > found.error + 4 * N * EPS * size:
        return row | {"verdict": "silently wrong"}
    # the claim of the first line, where it was divided there
    first = found.splits[0] if found.splits else None
    if first is None or first.failure:
        return row | {"verdict": "right"}
    row["off"] = abs(first.beyond - int((values.real > 0).sum()))
    if not row["off"]:
        return row | {"verdict": "right"}
    near = np.sort(np.abs(values.real))[: row["off"]].max()
    _, left, right = scipy.linalg.eig(a, left=True)
    condition = 1 / np.abs(np.sum(left.conj() * right, axis=0)).min()
    return row | {"verdict": "count off" if near <= max(condition * found.error, 1e-10 * size) else "silently wrong"}


if __name__ == "__main__":
    rows = []
    with threadpool_limits(1):
        for network, block in BLOCKS[: 1 if QUICK else None]:
            rows.append(real(network, block))
            print(rows[-1], flush=True)
        for name, a, values in list(hard())[:: 4 if QUICK else 1]:
            rows.append(judged(name, a, values))
            print(rows[-1], flush=True)
    verdicts = ("right", "count off", "refused", "silently wrong")
    counts = {v: sum(r["verdict"] == v for r in rows) for v in verdicts}
    write(__file__, {"counts": counts, "matrices": rows})
    assert counts["silently wrong"] == 0, [r for r in rows if r["verdict"] == "silently wrong"]
