"""Does a division find the eigenvalues of real and of hard matrices, and does it say where it cannot?

Reduced matrices of ResNet blocks (bundled weights, the first sample image), in parts of a fifth of their order, beside
LAPACK's eigenvalues of the whole; and the matrices of `honesty.py` (order 256, spectra known exactly), random ones and
Grcar's, in parts of 64. A division claims that its eigenvalues are those of a matrix that is no further away than what
it neglected: for each of the hard ones the smallest singular value of A - z I must be no larger than that, but for
rounding (4 n eps |A|), at every z found. It claims how many eigenvalues lie right of the first line, too. *right*: both
claims hold; *count off*: eigenvalues within what is neglected times their condition, or 1e-10 |A|, of the line were
counted on its other side, so that a certificate would have to say so; *refused*: it says that no curve divides the
matrix, or a part of it; *silently wrong*: none of these. `--quick` takes every fourth hard matrix and the smallest
block.
"""

import tempfile

import numpy as np
import scipy.linalg
from common import QUICK, block_calls, distance, stored, workspace, write
from honesty import N, cases
from threadpoolctl import threadpool_limits

from stiffcore.eigen import divide
from stiffcore.eigen.divide import DivisionError
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.unit import sparse_matrix

BLOCKS = [("resnet18", "layer4.1"), ("resnet18", "layer3.1"), ("resnet50", "layer3.1"), ("resnet50", "layer3.5")]
EPS = np.finfo(float).eps


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
