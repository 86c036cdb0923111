"""Does it fail honestly: are answers on hard matrices right, said to be uncertain, refused, or silently wrong?

Matrices of order 256 whose eigenvalues are known exactly, as functions x -> A x; by all eigenvalues (`host-dense`)
and by the ends alone (`extremes`, also where the plan would solve a matrix of that order whole). An answer is *right*
where the largest and smallest real parts and the share of negative ones are the true ones, within the stated error;
*uncertain* where it is not certified, says that signs are not known, leaves the count open, or states an error of a
tenth of the spectrum; *refused* where an error is raised. Certified and not right is *silently wrong*, of which there
must be none. `--quick` takes every third matrix.
"""

import math

import numpy as np
import scipy.linalg
import torch
from common import QUICK, write

import stiffcore
from stiffcore import plan
from stiffcore.errors import StiffcoreError

N = 256
COST = plan.PRODUCT_COST
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


def judged(a, values, solver):
    matrix = torch.tensor(a)
    plan.PRODUCT_COST = 0 if solver == "extremes" else COST
    try:
        found = stiffcore.spectrum(lambda x: x @ matrix.T, torch.zeros(len(a), dtype=torch.float64), solver=solver)
    except StiffcoreError as error:
        return "refused", str(error).splitlines()[0]
    certificate, m, real = found.certificate, found.metrics, values.real
    if not certificate.passed:
        return "uncertain", certificate.failures[0]
    scale, error = np.abs(values).max(), certificate.error
    said = math.isnan(m["negative"]) or certificate.near_axis
    if said:
        # what is said to be unsure may not be held against it; the ends may
        why = f"{certificate.near_axis} signs not known" if certificate.near_axis else "the count is open"
    allowed = 2 * error + 1e-12 * scale
    wrong = []
    for name, truth in (("abscissa", real.max()), ("min_re", real.min())):
        if not abs(m[name] - truth) <= allowed:
            wrong.append(f"{name} is off by {abs(m[name] - truth):.1e}, {error:.1e} stated")
    negative = float(np.mean(real < 0))
    if not said and not abs(m["negative"] - negative) <= 1e-12:
        wrong.append(f"negative is {m['negative']}, truly {negative}")
    if wrong:
        return "silently wrong", "; ".join(wrong)
    if error > 0.1 * scale:
        return "uncertain", f"error {error:.1e} stated"
    return ("uncertain", why) if said else ("right", f"error {error:.1e} stated")


if __name__ == "__main__":
    rows = []
    for name, a, values in list(cases())[:: 3 if QUICK else 1]:
        for solver in ("host-dense", "extremes"):
            verdict, why = judged(a, values, solver)
            rows.append({"matrix": name, "solver": solver, "verdict": verdict, "why": why})
            print(rows[-1], flush=True)
    counts = {v: sum(r["verdict"] == v for r in rows) for v in ("right", "uncertain", "refused", "silently wrong")}
    write(__file__, {"counts": counts, "matrices": rows})
    assert counts["silently wrong"] == 0, [r for r in rows if r["verdict"] == "silently wrong"]
