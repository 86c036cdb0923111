"""Matrices and functions made to break what is said of a spectrum, with the truth, and the solvers without a store.

`cases(seed)` draws one function of each family. Its Jacobian in exact arithmetic is known as fractions, its eigenvalues
from 300 bits (python-flint), or from a triangular or block diagonal form that an exact similarity (permutations,
Hadamard matrices, powers of two) hides. `answer` gives a spectrum as a unit of a run makes it, and `lies` lists what in
it is false: an eigenvalue further from every true one than its error, a share of negative ones beyond what is said to
be certain, a proved count that is not the true one, an S outside of its error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy.linalg
import torch
from flint import acb_mat, ctx, fmpq, fmpq_mat
from scipy.sparse import csc_array

from stiffcore.eigen import certificate, counting, dense, divide, extremes, panels, singular
from stiffcore.eigen.numerical_range import range_bounds
from stiffcore.eigen.sparse import DENSE_ORDER, EPS
from stiffcore.jacobian.factors import open_factors
from stiffcore.jacobian.reduction import Reduction, reduce_jacobian
from stiffcore.spectra import Ends, Moments, Spectrum, certified_choice
from tests.test_divide import Memory

BITS = 300
SOLVERS = ("host-dense", "extremes", "divide", "singular")
# What eigenvalues from 300 bits may be off by, and what ends of a spectrum of 110 rows from LAPACK, relative.
ROUNDED, LAPACK = 4e-16, 1e-10
Array = np.ndarray


# ------------------------------------------------------------------------------------------------- the truth


def rational(a: Array) -> fmpq_mat:
    """A matrix as it is, as fractions."""
    pairs = (float(v).as_integer_ratio() for v in np.asarray(a, float).ravel())
    return fmpq_mat(*a.shape, [fmpq(p, q) for p, q in pairs])


def eigenvalues(a: fmpq_mat) -> tuple[Array, tuple[int, int]]:
    """Those of a matrix of fractions, in double precision, and how many are negative, at least and at most.

    flint's iteration may end at wrong values (of multiple ones, at some precisions): their sum and the sum of their
    squares are held against the traces, and more bits taken where these differ.
    """
    if not a.nrows():
        return np.zeros(0, complex), (0, 0)
    square = a * a
    for more in (0, 53, 200, 400):
        ctx.prec = BITS + more
        found = acb_mat(a).eig(algorithm="approx")
        traces = (sum((m[i, i] for i in range(1, a.nrows())), m[0, 0]) for m in (acb_mat(a), acb_mat(square)))
        size = max(max(abs(complex(z.real.mid(), z.imag.mid())) for z in found), 1e-300)
        sums = sum(found[1:], found[0]), sum((z * z for z in found[1:]), found[0] * found[0])
        gaps = [(total - trace).abs_lower() for total, trace in zip(sums, traces, strict=True)]
        if gaps[0] <= size * 2.0**-64 and gaps[1] <= size * size * 2.0**-64:
            break
    else:
        raise ArithmeticError("flint's eigenvalues miss the trace")
    values = np.array([complex(float(z.real.mid()), float(z.imag.mid())) for z in found])
    small = float(np.abs(values).max()) * 2.0**-60  # of 300 bits, what defective eigenvalues of order 4 leave
    sure = sum(float(z.real.mid()) < -small for z in found)
    return values, (sure, sum(float(z.real.mid()) <= small for z in found))


@dataclass(frozen=True)
class Truth:
    """Of a Jacobian.

    Attributes:
        values: (n,) complex, all eigenvalues.
        negative: how many have a negative real part, at least and at most.
        slack: what they may be off by, relative to the largest.
    """

    values: Array
    negative: tuple[int, int]
    slack: float = ROUNDED

    @classmethod
    def known(cls, values: Array, slack: float = ROUNDED) -> "Truth":
        """Of eigenvalues whose signs are exact."""
        values = np.asarray(values, complex)
        return cls(values, (int((values.real < 0).sum()), int((values.real < 0).sum())), slack)

    @classmethod
    def of(cls, a: fmpq_mat) -> "Truth":
        """From 300 bits."""
        return cls(*eigenvalues(a))


@dataclass(frozen=True)
class Case:
    """A function at a point, and the truth of its Jacobian.

    Attributes:
        family: what it is made to break.
        f: takes and returns (n,).
        x: (n,), the point.
        make: its truth, found when it is asked for.
        jacobian: as fractions, where it is known so.
    """

    family: str
    f: Callable
    x: torch.Tensor
    make: Callable[[], Truth]
    jacobian: Callable[[], fmpq_mat]

    @cached_property
    def truth(self) -> Truth:
        return self.make()

    @cached_property
    def reduction(self) -> Reduction:
        return reduce_jacobian(self.f, self.x)

    @cached_property
    def singular(self) -> Array:
        """The singular values of the Jacobian, ascending, from 300 bits."""
        j = self.jacobian()
        squares = eigenvalues(j.transpose() * j)[0].real
        return np.sort(np.sqrt(np.maximum(squares, 0)))

    @property
    def name(self) -> str:
        return f"{self.family}, n = {self.x.numel()}, {str(self.x.dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------------------------------------- the matrices


@lru_cache
def hadamard(n: int) -> Array:
    return scipy.linalg.hadamard(n).astype(float)


def turned(t: Array) -> Array | None:
    """H T H^T / n, where all numbers on the way are whole ones below 2^53, but for a power of two; else None."""
    n, h = len(t), hadamard(len(t))
    scale = 2.0 ** (52 - np.frexp(np.abs(t).sum() * n)[1])
    whole = t * scale
    if not t.any() or not np.array_equal(whole, np.round(whole)):
        return None
    return h @ whole @ h.T / (scale * n)


def dyadic(rng, low, high, size, bits=12) -> Array:
    return np.round(rng.uniform(low, high, size) * 2.0**bits) / 2.0**bits


def grcar(n, k=3) -> Array:
    return sum(np.eye(n, k=j) for j in range(k + 1)) - np.eye(n, k=-1)


def kahan(n, s=0.1) -> Array:
    s = s ** (1 / (n - 1))
    return np.diag(s ** np.arange(n)) @ (np.eye(n) - (1 - s * s) ** 0.5 * np.triu(np.ones((n, n)), 1))


def frank(n) -> Array:
    i, j = np.indices((n, n))
    return np.where(j >= i - 1, n - np.maximum(i, j), 0).astype(float)


def rotation(re, im) -> Array:
    return np.array([[re, -im], [im, re]])


def upper(rng, n, size) -> Array:
    return size * np.triu(np.round(rng.uniform(-16, 16, (n, n))) / 16, 1)


Drawn = tuple[Array, Array | None]
MATRICES: dict[str, Callable[..., Drawn]] = {}


def family(name: str) -> Callable:
    """Give a family its name: a function of a generator, to a matrix and its eigenvalues (None: from 300 bits)."""

    def named(make):
        MATRICES[name] = make
        return make

    return named


def hidden(t: Array, values: Array | None) -> Drawn:
    """In a Hadamard basis, where that rounds nothing; else the eigenvalues are those of what it is rounded to."""
    found = turned(t)
    if found is not None:
        return found, values
    h = hadamard(len(t))
    return h @ t @ h.T / len(t), None


@family("Grcar")
def _(rng) -> Drawn:
    n = int(rng.choice([8, 16, 32]))
    a = rng.choice([1.0, -1.0]) * grcar(n) + float(dyadic(rng, -2, 2, ())) * np.eye(n)
    return hidden(a, None) if rng.random() < 0.5 else (a, None)


@family("Kahan")
def _(rng) -> Drawn:
    n = int(rng.integers(5, 40))
    p, a = rng.permutation(n), kahan(n, rng.choice([0.1, 1e-3, 1e-6])) * 2.0 ** float(rng.integers(-3, 4))
    return a[p][:, p], np.diag(a) + 0j


@family("Frank")
def _(rng) -> Drawn:
    n = int(rng.choice([6, 8, 12, 16]))
    a = frank(n) if rng.random() < 0.5 else frank(n).T
    return hidden(a, None) if n in (8, 16) and rng.random() < 0.5 else (a, None)


@family("companion")
def _(rng) -> Drawn:
    n, at = int(rng.integers(4, 15)), float(rng.integers(0, 15))
    roots = np.arange(1, n + 1)
    p = [1]
    for root in roots.tolist():
        p = [a - root * b for a, b in zip([*p, 0], [0, *p], strict=True)]  # exact in whole numbers
    a = np.diag(np.ones(n - 1), -1)
    a[0] = -np.array(p[1:], float)
    return a - at * np.eye(n), roots - at + 0j


@family("graded")
def _(rng) -> Drawn:
    n, reach = int(rng.integers(5, 25)), int(rng.choice([5, 15, 30]))
    d = 2.0 ** np.round(np.linspace(-reach, reach, n))
    g = np.round(rng.standard_normal((n, n)) * 2**12) / 2**12
    kind, p = rng.integers(3), rng.permutation(n)
    a = (d[:, None] * g / d, d[:, None] * g, np.triu(d[:, None] * g))[kind]
    return a[p][:, p], None if kind < 2 else np.diag(a) + 0j


@family("clustered at 0 and 1")
def _(rng) -> Drawn:
    n = int(rng.choice([8, 16]))
    grid = 2.0 ** -float(rng.choice([8, 16, 24]))
    d = rng.integers(0, 2, n) + grid * rng.integers(-4, 5, n)
    return hidden(np.diag(d) + upper(rng, n, float(rng.choice([0.0, 2.0**-6, 1.0]))), d + 0j)


@family("near the axis")
def _(rng) -> Drawn:
    n, near = int(rng.choice([8, 16])), 2.0 ** -float(rng.integers(20, 54))
    d = np.concatenate([near * rng.integers(-3, 4, 3), dyadic(rng, -1, 1, n - 3, 6)])
    return hidden(np.diag(d) + upper(rng, n, float(rng.choice([0.0, 2.0**-6, 1.0]))), d + 0j)


@family("pairs near the axis")
def _(rng) -> Drawn:
    n, near = 16, 2.0 ** -float(rng.integers(10, 45))
    parts = [rotation(x, y) for x, y in zip(near * rng.integers(-3, 4, n // 2), dyadic(rng, 0, 4, n // 2), strict=True)]
    t = scipy.linalg.block_diag(*parts)
    return hidden(t, np.concatenate([[p[0, 0] + 1j * p[1, 0], p[0, 0] - 1j * p[1, 0]] for p in parts]))


@family("ill-conditioned eigenvectors")
def _(rng) -> Drawn:
    n, condition = int(rng.integers(6, 24)), 10.0 ** rng.integers(1, 12)
    q = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2)]
    x = q[0] * np.logspace(0, np.log10(condition), n) @ q[1]
    return x @ np.diag(rng.uniform(-1, 2, n)) @ np.linalg.inv(x), None


@family("random triangular")
def _(rng) -> Drawn:
    n = int(rng.choice([8, 16]))
    d = dyadic(rng, float(rng.choice([-1, 0.01])), 2, n, 8)
    return hidden(np.diag(d) + upper(rng, n, 2.0 ** float(rng.integers(-4, 8))), d + 0j)


@family("skew-dominated")
def _(rng) -> Drawn:
    n = int(rng.integers(6, 28))
    g = rng.standard_normal((n, n)) / n**0.5
    return rng.choice([1, 10, 100]) * (g - g.T) + np.diag(rng.uniform(rng.choice([0.5, -0.01]), 1, n)), None


@family("oscillators")
def _(rng) -> Drawn:
    n = 16
    re, im = dyadic(rng, -1, 0.1, n // 2, 8), dyadic(rng, 1, 50, n // 2, 6)
    t = scipy.linalg.block_diag(*(rotation(a, b) for a, b in zip(re, im, strict=True)))
    return hidden(t, np.concatenate([re + 1j * im, re - 1j * im]))


@family("Jordan block")
def _(rng) -> Drawn:
    m, j = int(rng.choice([2, 4, 8, 16])), float(rng.integers(-3, 4))
    size = (2.2e-16) ** (1 / m) * 2.0**j * 3  # what rounding scatters it by
    value = max(round(float(rng.uniform(0, 1.5)) * size * 2.0**40) / 2.0**40, 2.0**-40) * rng.choice([1, -1])
    return hidden(value * np.eye(m) + 2.0**j * np.eye(m, k=1), np.full(m, value + 0j))


def company(rng, t, values) -> Drawn:
    """A hidden block beside normal company that holds the ends and all that is nearest to the axis."""
    t = turned(t)
    assert t is not None
    near = np.arange(1, 5) * 2.0 ** -float(rng.choice([4, 12]))
    d = np.concatenate([[-5, -4.5, 5, 4.5], near, -near])
    return scipy.linalg.block_diag(np.diag(d), t), np.concatenate([d, values]) + 0j


@family("Jordan block in company")
def _(rng) -> Drawn:
    m, value = int(rng.choice([8, 16, 32])), 2.0 ** -float(rng.integers(1, 5))
    return company(rng, value * np.eye(m) + np.eye(m, k=1), np.full(m, value))


@family("Toeplitz block in company")
def _(rng) -> Drawn:
    m, b, a = int(rng.choice([16, 32, 64])), 2.0 ** -float(rng.choice([8, 14, 20])), 2.0 ** -float(rng.integers(0, 4))
    t = np.diag(np.full(m - 1, b), -1) + a * np.eye(m) + np.eye(m, k=1)
    return company(rng, t, a + 2 * b**0.5 * np.cos(np.arange(1, m + 1) * np.pi / (m + 1)))


@family("Toeplitz")
def _(rng) -> Drawn:
    n = int(rng.choice([8, 16, 32]))
    t = sum(float(dyadic(rng, -2, 2, (), 4)) * np.eye(n, k=k) for k in (-2, -1, 0, 1, 2, 3))
    return hidden(t, None) if rng.random() < 0.7 else (t, None)


@family("balancing hides a defective pair")
def _(rng) -> Drawn:
    p, t = int(rng.choice([3, 5, 8])), 2.0 ** -float(rng.choice([12, 18, 22]))
    first, second = ([0.0, *rng.uniform(1, 3, p - 1)] for _ in range(2))
    c, back = (rng.uniform(0.5, 1, (p, p)) * rng.choice([-1, 1], (p, p)) for _ in range(2))
    back[0, 0] = 0
    return np.block([[np.diag(first), t * t * c], [back, np.diag(second)]]), None


@family("random")
def _(rng) -> Drawn:
    n = int(rng.integers(4, 28))
    g = rng.standard_normal((n, n)) / n**0.5
    return (g, np.eye(n) + 0.9 * g, g - g.T, g + g.T, g[:, :3] @ g[:3])[rng.integers(5)], None


@family("of any size")
def _(rng) -> Drawn:
    n = 8
    d = dyadic(rng, -1, 1, n, 6)
    a, values = hidden(np.diag(d) + upper(rng, n, 2.0**-4), d + 0j)
    scale = 2.0 ** float(rng.choice([-120, -60, 60, 120]))
    return a * scale, None if values is None else values * scale


# --------------------------------------------------------------------------------------------- the functions


def matrix_case(name: str, rng, dtype: torch.dtype) -> Case:
    """x -> A x; rounded to single precision first, where that is asked."""
    a, values = MATRICES[name](rng)
    narrow = np.array(a, np.float32).astype(float) if dtype == torch.float32 else a
    values = values if np.array_equal(narrow, a) else None
    matrix = torch.tensor(narrow, dtype=dtype)
    known = (lambda: Truth.known(values)) if values is not None else lambda: Truth.of(rational(narrow))
    return Case(name, lambda x: matrix @ x, torch.ones(len(a), dtype=dtype), known, lambda: rational(narrow))


FUNCTIONS = (
    "detached part",
    "straight-through rounding",
    "low precision inside",
    "cancelling factors",
    "waist near the axis",
    "zero but for rounding",
)


def function_case(name: str, rng, dtype: torch.dtype) -> Case:
    """x + U relu(V x + b), with something in it that a graph, or rounding, loses."""
    n, k = int(rng.integers(8, 20)), int(rng.integers(3, 8))
    into, out, other = (torch.tensor(rng.standard_normal(s) / n**0.5, dtype=dtype) for s in ((k, n), (n, k), (n, k)))
    bias = torch.tensor(rng.uniform(0.5, 3, k) * rng.choice([-1, 1, 1], k), dtype=dtype)
    x, small = torch.zeros(n, dtype=dtype), float(2.0 ** -rng.integers(1, 30))
    on, v, u = (bias > 0).double(), into.double(), out.double()
    skip = torch.eye(n, dtype=torch.float64)
    product = (u * on, v)  # J - skip, as two factors

    def hidden_layer(y):
        return torch.relu(into @ y + bias)

    if name == "detached part":

        def f(y):
            return y + out @ hidden_layer(y) + small * (other @ hidden_layer(y)).detach()
    elif name == "straight-through rounding":
        outer = float(rng.choice([1.0, 0.25]))

        def f(y):
            h = hidden_layer(y)
            return y + out @ (h + outer * (torch.round(h * 64) / 64 - h).detach())
    elif name == "low precision inside":
        low = torch.bfloat16 if rng.random() < 0.5 else torch.float16

        def f(y):
            return y + (out.to(low) @ hidden_layer(y).to(low)).to(dtype)
    elif name == "cancelling factors":
        size = float(2.0 ** rng.integers(0, 16))
        inverse = np.linalg.pinv(v.numpy())
        noise = rng.standard_normal((n, k))
        out = torch.tensor(inverse @ np.diag(rng.uniform(-2, 0, k)) + size * (noise - inverse @ (v.numpy() @ noise)))
        out = out.to(dtype)
        product = (out.double() * on, v)

        def f(y):
            return y + out @ hidden_layer(y)
    elif name == "waist near the axis":
        size = -1 / torch.linalg.eigvals(v @ (u * on)).real.min()
        near = float(size) * (1 + small * rng.choice([-1, 1]))
        out = (out.double() * near).to(dtype)
        product = (out.double() * on, v)

        def f(y):
            return y + out @ hidden_layer(y)
    else:
        whole = out @ into
        product, skip = (torch.cat([u, -whole.double()], 1), torch.cat([v, skip])), torch.zeros(n, n).double()

        def f(y):
            return out @ (into @ y) - whole @ y

    def jacobian() -> fmpq_mat:
        return rational(skip.numpy()) + rational(product[0].numpy()) * rational(product[1].numpy())

    return Case(name, f, x, lambda: Truth.of(jacobian()), jacobian)


TALL = (
    "skew couplings",
    "sparse skew couplings",
    "antisymmetric convolution",
    "many oscillators",
    "large Jordan block in company",
    "large Toeplitz block in company",
    "many near the axis",
    "Toeplitz block of 512 in company",
)


def tall_case(name: str, rng, dtype: torch.dtype) -> Case:
    """Of order 110 to 524, more than is solved whole; truth by LAPACK where that is well conditioned, else known."""
    n = int(rng.integers(55, 80)) * 2
    g, values = rng.standard_normal((n, n)), None
    if name == "large Jordan block in company":
        a, values = company(rng, 0.5 * np.eye(128) + np.eye(128, k=1), np.full(128, 0.5))
    elif name == "large Toeplitz block in company":
        t = np.diag(np.full(127, 2.0**-14), -1) + 0.25 * np.eye(128) + np.eye(128, k=1)
        a, values = company(rng, t, 0.25 + 2.0**-6 * np.cos(np.arange(1, 129) * np.pi / 129))
    elif name == "Toeplitz block of 512 in company":
        t = np.diag(np.full(511, 2.0**-14), -1) + 0.25 * np.eye(512) + np.eye(512, k=1)
        a, values = company(rng, t, 0.25 + 2.0**-6 * np.cos(np.arange(1, 513) * np.pi / 513))
    elif name == "many near the axis":
        d = np.concatenate([2.0 ** -float(rng.integers(5, 24)) * rng.integers(-3, 4, 28), dyadic(rng, 0.5, 1, 100, 6)])
        a, values = hidden(np.diag(d) + upper(rng, 128, float(rng.choice([0.0, 2.0**-8]))), d + 0j)
    elif name == "skew couplings":
        a = float(rng.choice([1, 10, 100])) * (g - g.T) / n**0.5 + np.diag(rng.uniform(0.5, 1, n))
    elif name == "sparse skew couplings":
        s = np.triu(10 * g * (rng.random((n, n)) < 6 / n), 1)
        a = s - s.T + np.diag(rng.uniform(0.5, 1, n))
    elif name == "antisymmetric convolution":
        a = 5 * (np.eye(n, k=1) - np.eye(n, k=-1)) + np.diag(rng.uniform(0.5, 1, n))
    else:
        pairs = zip(rng.uniform(-1, -0.01, n // 2), rng.uniform(1, 50, n // 2), strict=True)
        q = np.linalg.qr(g)[0]
        a = q @ scipy.linalg.block_diag(*(rotation(re, im) for re, im in pairs)) @ q.T
    narrow = np.array(a, np.float32).astype(float) if dtype == torch.float32 else a
    exact = values is not None and np.array_equal(narrow, a)
    matrix = torch.tensor(narrow, dtype=dtype if exact or values is None else torch.float64)

    def known() -> Truth:
        return Truth.known(values) if values is not None else Truth.known(np.linalg.eigvals(narrow), LAPACK)

    return Case(name, lambda x: matrix @ x, torch.ones(len(a), dtype=matrix.dtype), known, lambda: rational(narrow))


# Families whose answers take several times as long as those of others.
COSTLY = ("Grcar", "Kahan", "Jordan block in company", "Toeplitz block in company")


def cases(seed: int, *, tall: bool = True, costly: bool = True) -> Iterator[Case]:
    """One function of each family, in one of both precisions by turns."""
    rng = np.random.default_rng([seed, 21])
    matrices = [name for name in MATRICES if costly or name not in COSTLY]
    kinds = [(matrix_case, matrices), (function_case, FUNCTIONS)] + ([(tall_case, TALL)] if tall else [])
    for make, names in kinds:
        for at, name in enumerate(names):
            yield make(name, rng, (torch.float64, torch.float32)[(seed + at) % 2])


# ----------------------------------------------------------------------------------------------- the answers


def solved(r: Reduction) -> Spectrum:
    """By all eigenvalues."""
    a = np.asfortranarray(r.columns(0, r.k).cpu().numpy()) if r.k else np.zeros((0, 0), order="F")
    moments, h = certificate.matrix_moments(a), dense.to_hessenberg(a.copy(order="F"))
    held = dense.Hessenberg(h.a.copy(order="F"), h.tau, h.scale, h.ilo, h.ihi)
    values = dense.hessenberg_eigenvalues(held) if r.k else np.zeros(0, complex)
    chosen = certified_choice(values, r.shift)
    vectors = dense.hessenberg_eigenvectors(h, values[chosen]) if r.k else None
    proved = proofs(r, a, values, chosen, vectors, moments) if r.k > certificate.FULL_ORDER else {}
    found = certificate.certify(r, values, chosen, vectors, moments, **proved)
    return spectrum(r, values, "host-dense", found, moments.frobenius)


def proofs(r: Reduction, a: Array, values, chosen, vectors, moments) -> dict:
    """What a unit of a larger order has proved before its certificate."""
    matrix = csc_array(np.asarray(a, float))
    if r.k > DENSE_ORDER:
        parts = range_bounds(matrix, -float(r.shift), moments.frobenius)
    else:
        low, *_, high = np.linalg.eigvalsh((matrix + matrix.T).toarray()) / 2
        off = 10 * r.k * EPS * moments.frobenius
        parts = (float(low) - off, float(high) + off)
    whole = counting.Whole(np.asarray(values.real, float), parts, certificate.side_of_axis(r, parts))
    known = values[chosen].astype(complex), vectors.right.astype(complex)
    given = {"disc": True, "memory_bytes": None, "note": "", "rounding": certificate.distance_of(r), "whole": whole}
    return {"real_parts": parts, "ends": counting.ends_of(matrix, r.shift, known, **given)}


def divided(r: Reduction) -> Spectrum:
    """By division, with leaves of half the order."""
    if r.k < 8:
        return solved(r)
    a = np.asfortranarray(r.columns(0, r.k).double().cpu().numpy())
    space = Memory(32)
    whole = space.matrix("whole", r.k, r.k)
    for i in range(whole.shards):
        start, stop = whole.columns(i)
        whole.write(i, a[:, start:stop])
    moments = Moments(panels.trace(whole), panels.square_trace(whole), panels.norm(whole))
    found = divide.eigenvalues(whole, space, r.k // 2, first=-float(r.shift))
    chosen = certified_choice(found.values, r.shift)
    vectors = divide.eigenvectors(whole, space, found.values[chosen])
    certified = certificate.certify(
        r, found.values, chosen, vectors, moments, neglected=float(found.error), right=found.right
    )
    return spectrum(r, found.values, "divide", certified, moments.frobenius)


def by_ends(r: Reduction) -> Spectrum:
    """By the ends, and a count."""
    a = csc_array(r.columns(0, r.k).double().cpu().numpy())
    e, moments = extremes.extremes(a), certificate.sparse_moments(a)
    known = e.values, e.vectors.right
    given = {"note": e.note, "rounding": r.rounding + r.loss, "enclosures": e.enclosures}
    ends = counting.ends_of(a, r.shift, known, disc=False, memory_bytes=None, **given)
    found = certificate.certify_ends(
        r, e.values, e.vectors, moments, ends, right_end=e.converged_right, left_end=e.converged_left
    )
    return spectrum(r, e.values, "extremes", found, moments.frobenius, ends)


def spectrum(r: Reduction, values, solver, found, frobenius, ends: Ends | None = None) -> Spectrum:
    shown = dense.sort_eigenvalues(values + values.dtype.type(r.shift))
    return Spectrum(
        shown, r.ones, r.zeros, r.k, "matrix", "block", "f", solver, r.reason, found,
        ends=ends, shift=r.shift, frobenius=frobenius,
    )  # fmt: skip


WAYS = {"host-dense": solved, "divide": divided, "extremes": by_ends}


# ------------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class Judgement:
    """What was said of one case.

    Attributes:
        certified: whether it was certified at all.
        plain: whether nothing was left open.
        ratios: true errors over stated ones, of each certified value.
        lies: what is false, in words; empty where nothing is.
    """

    certified: bool
    plain: bool
    ratios: tuple[float, ...]
    lies: tuple[str, ...]


def judged(case: Case, solver: str) -> Judgement:
    """Ask, and compare with the truth.

    Raises:
        StiffcoreError: where the question is refused.
    """
    if solver == "singular":
        return _judged_singular(case)
    found = WAYS[solver](case.reduction)
    if not found.certificate.passed:
        return Judgement(False, False, (), ())
    truth, certificate_ = case.truth, found.certificate
    off = truth.slack * np.abs(truth.values).max(initial=0)
    lies, ratios = [], []
    for c in certificate_.certified:
        apart = max(0.0, float(np.abs(truth.values - c.value).min()) - off)
        ratios.append(apart / c.error if c.error else float("inf") if apart else 0.0)
        if not apart <= c.error:
            lies.append(f"{c.value:.9g} is off by {apart:.2e}, said {c.error:.2e}")
    lies += _wrong_counts(found, truth) + _wrong_ends(found, truth, off)
    return Judgement(True, not found.doubts, tuple(ratios), tuple(lies))


def _wrong_counts(found: Spectrum, truth: Truth) -> list[str]:
    if found.ends is not None and found.ends.left_of_zero.count is not None:
        low = high = found.ends.left_of_zero.count
    elif found.negative_between is None:
        return []
    else:
        low, high = found.negative_between
    if high < truth.negative[0] or low > truth.negative[1]:
        return [f"{low} to {high} are said to be negative, {truth.negative[0]} to {truth.negative[1]} are"]
    return []


def _wrong_ends(found: Spectrum, truth: Truth, off: float) -> list[str]:
    """S_active against its error: of the true eigenvalues but the structural zeros, which are exact."""
    s, error = found.metrics["S_active"], found.certificate.s_active_error
    real = truth.values[np.argsort(np.abs(truth.values), kind="stable")][found.zeros :].real
    if not len(real) or not np.isfinite(error) or not np.isfinite(s):
        return []
    least, most = real.min(), real.max()
    if abs(least) <= off:
        return [f"S active is {s:.9g} with error {error:.2e}, but min Re is 0"]
    true = most / least
    allowed = error + 4 * off * (1 + abs(true)) / abs(least)
    return [] if abs(s - true) <= allowed else [f"S active is {s:.9g} with error {error:.2e}, truly {true:.9g}"]


def _judged_singular(case: Case) -> Judgement:
    factors = open_factors(case.f, case.x)
    matrices = factors.matrices(16)
    certified, plain, ratios, lies = True, True, [], []
    way = (singular.by_waist,) if factors.reduction is not None else (singular.by_svd, singular.by_gram)
    for solve in way:
        found = solve(factors, *matrices)
        c = singular.certify(factors, found, factors.difference(matrices))
        certified, plain = certified and c.passed, plain and not c.near_axis
        if not c.passed:
            continue
        exact = np.concatenate([np.ones(found.ones), np.zeros(found.zeros)])
        values = np.concatenate([found.values, exact])
        errors = np.concatenate([found.errors + factors.rounding, np.zeros(len(exact))])
        order = np.argsort(values, kind="stable")
        off = 2.0**-52 * case.singular.max(initial=0) + 1e-300
        apart = np.maximum(np.abs(values[order] - case.singular) - off, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(apart > 0, apart / errors[order], 0.0)
        ratios.append(float(share.max(initial=0)))
        worst = int(np.argmax(share))
        if share[worst] > 1:
            lies.append(
                f"{solve.__name__}: {values[order][worst]:.9g} is off by {apart[worst]:.2e}, said "
                f"{errors[order][worst]:.2e}"
            )
    return Judgement(certified, plain, tuple(ratios), tuple(lies))


def solvers_for(case: Case) -> tuple[str, ...]:
    """Those that a case of its order is given to: the ends of small matrices would be solved whole."""
    if case.family.startswith("Toeplitz block of 512"):  # the search for its ends takes minutes
        return ("host-dense",)
    if case.family in TALL:
        return ("extremes", "host-dense")
    return SOLVERS
