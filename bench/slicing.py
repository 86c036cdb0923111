"""Would slices of the spectrum, by shift-invert Arnoldi on sparse LUs, be cheaper than dividing it?

The reduced matrix of a block (bundled weights, the first sample image), one shift after the other: at 0 of J, at the
mean of the eigenvalues, and above it at half their spread. Each is one sparse LU of M - z I, complex, and Arnoldi for
the 50, 100, 200 and 400 eigenvalues nearest to z (ARPACK, twice as many vectors, tolerance 1e-10); the yield is what
converged, by the second. A spectrum is its own conjugate, so that half of it is enough: *all at least* is k / 2
eigenvalues at that yield, as if no slice overlapped another and none were missed. Beside it the seconds of LAPACK on
the whole matrix (Hessenberg reduction and QR). Seconds are of the processor, on one thread. (`--quick`: ResNet18's
layer4.1 alone.)
"""

import time

import numpy as np
from common import QUICK, block_calls, cpu_seconds, write
from scipy.sparse import eye_array
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs, splu
from threadpoolctl import threadpool_limits

from stiffcore.eigen import dense
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.unit import sparse_matrix

BLOCKS = [("resnet18", "layer4.1"), ("resnet50", "layer3.1"), ("resnet18", "layer2.1"), ("resnet50", "layer1.1")]
WANTED = (50, 100, 200, 400)


def slices(m, shift):
    k = m.shape[0]
    mean = m.trace() / k
    spread = np.sqrt(abs((m @ m).trace() / k - mean**2))
    for name, z in {"0 of J": -shift, "the mean": mean, "above the mean": mean + 0.5j * spread}.items():
        lu, factor_s = cpu_seconds(lambda z=z: splu((m - z * eye_array(k, format="csc")).astype(complex).tocsc()))
        inverse = LinearOperator((k, k), lu.solve, dtype=complex)
        for wanted in WANTED[: 2 if QUICK else None]:
            if 2 * wanted >= k:
                continue
            start = time.process_time()
            try:
                v0 = np.random.default_rng(0).standard_normal(k) + 0j
                found = eigs(inverse, wanted, tol=1e-10, v0=v0, ncv=2 * wanted, return_eigenvectors=False)
            except ArpackNoConvergence as error:
                found = error.eigenvalues
            seconds = time.process_time() - start
            yield {
                "at": name,
                "wanted": wanted,
                "found": len(found),
                "fill": int(lu.nnz),
                "factor_s": factor_s,
                "arnoldi_s": seconds,
                "all_s": k / 2 / max(1, len(found)) * (factor_s + seconds),
                "factor_bytes": 20 * int(lu.nnz),
            }
            print(name, wanted, len(found), factor_s, seconds, flush=True)


def measured(network, block):
    call = block_calls(network)[block]
    reduction = reduce_jacobian(call.function, call.x)
    m = sparse_matrix(reduction, 256)
    a = np.asfortranarray(m.toarray())
    values, seconds = cpu_seconds(lambda: dense.hessenberg_eigenvalues(dense.to_hessenberg(a)))
    row = {"network": network, "block": block, "k": len(values), "nonzeros": int(m.nnz), "dense_s": seconds}
    print(row, flush=True)
    return row | {"slices": list(slices(m, reduction.shift))}


if __name__ == "__main__":
    with threadpool_limits(1):
        write(__file__, {"blocks": [measured(*names) for names in BLOCKS[: 1 if QUICK else None]]})
