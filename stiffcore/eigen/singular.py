"""Singular values of a Jacobian, from its factors: by an SVD, or from a symmetric matrix of their squares.

That matrix is solved in memory, or made and divided in the store (`stiffcore.eigen.divide`).

With J = D (s I + U V) on the rows S, W = [U, V_S^T] and K = [[V V^T, I], [I, 0]] (V_S: the columns S of V), for s = 1,

    J_S J_S^T = I + W K W^T,

and with W^T W = R^T R the squares are 1 + eig(R K R^T), |S| - rank ones, and zeros; for s = 0 they are eig(R V V^T R^T)
with U^T U = R^T R. R comes from Cholesky's factorisation with pivots (LAPACK's pstrf), since W may lack rank; in the
store from that of W^T W + d I, without pivots: as if W had more rows, sqrt(d) I, see `_uncertainty`.

Squares are right to eps |J|^2, so a value s is to eps |J|^2 / s: small ones lose digits, half of them where s is near
sqrt(eps) |J|, which `errors` says. Values near 1 that come through W are right to the root of its rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh, svds

from stiffcore.eigen import divide, panels
from stiffcore.eigen.certificate import RESIDUAL_TOLERANCE
from stiffcore.eigen.divide import Division, DivisionError, Workspace
from stiffcore.eigen.panels import Each, Panels, SingularError, one_by_one
from stiffcore.jacobian.factors import Factors
from stiffcore.jacobian.linearise import Linearisation
from stiffcore.metrics import stiffness_error
from stiffcore.spectra import Certificate, Certified

Array = NDArray[np.float64]
# What a value of an SVD may be off by, in eps |J|, or a square, in eps |J|^2, of a Cholesky factorisation, two products
# and an eigensolver: so much, and so much more for each row (LAPACK's bounds grow with the order; 29 were seen of 16
# rows). All of it is in float64; the rounding of J itself is measured.
SOLVER_ROUNDING, SOLVER_ROUNDING_PER_ROW = 16, 4
# What the rounding of U's and V's entries moves a square by, in eps |W|^2 |K|.
ENTRY_ROUNDING = 4


@dataclass(frozen=True)
class SingularValues:
    """Singular values that were computed, and how many more are exact.

    Attributes:
        values: (k,) float64, ascending.
        ones: how many more are exactly 1.
        zeros: how many more are exactly 0.
        errors: (k,) estimates of how far each may be off.
        sum_error: |sum of squares - |J|_F^2|, relative, of the matrix that was solved.
        fourth_error: the same of the squares' squares; nan for an SVD.
    """

    values: Array
    ones: int
    zeros: int
    errors: Array
    sum_error: float
    fourth_error: float

    def times(self, power: int) -> "SingularValues":
        """Those of 2^power J."""
        return replace(self, values=np.ldexp(self.values, power), errors=np.ldexp(self.errors, power))


def _scaled(matrix: sp.csc_array) -> tuple[sp.csc_array, int]:
    """A matrix in float64 with its largest entry in [1/2, 1), and the power of two that it has to be multiplied with.

    Squares of numbers below 1e-162 are zero, and those above 1e154 infinite.
    """
    exactly = matrix.astype(np.float64)  # a copy
    power = int(np.frexp(np.abs(exactly.data).max(initial=0))[1])
    exactly.data = np.ldexp(exactly.data, -power)
    return exactly, power


def by_svd(factors: Factors, j: sp.csc_array) -> SingularValues:
    """The singular values of J, by LAPACK's gesdd on its nonzero rows and columns.

    Memory: one dense copy, and the workspace that gesdd asks for (a few vectors and blocks of them).
    """
    exactly, power = _scaled(j)
    dense = np.asfortranarray(exactly.toarray())
    dense_shape = exactly.shape
    del exactly
    squares = float(np.einsum("ij,ij->", dense, dense))
    values = np.sort(scipy.linalg.svdvals(dense, overwrite_a=True)) if dense.size else np.zeros(0)
    errors = np.full(len(values), _solver_rounding(min(dense_shape)) * values.max(initial=0))
    missed = _relative(float((values**2).sum()), squares)
    return SingularValues(values, 0, factors.count - len(values), errors, missed, np.nan).times(power)


def by_gram(factors: Factors, j: sp.csc_array) -> SingularValues:
    """The singular values of J, from the Gram matrix of its smaller side.

    Memory: that matrix, dense, twice.
    """
    rows, power = _of_smaller_side(j)
    gram = rows @ rows.T
    return _from_squares(factors, gram.toarray(), 0, factors.count - gram.shape[0]).times(power)


def _of_smaller_side(j: sp.csc_array) -> tuple[sp.sparray, int]:
    """J or its transpose, in float64, with no more rows than columns, and scaled as `_scaled` does."""
    exactly, power = _scaled(j)
    return (exactly if j.shape[0] <= j.shape[1] else exactly.T), power


def by_division(
    factors: Factors,
    matrices: list[sp.csc_array],
    space: Workspace,
    most: int,
    *,
    at_once: int = 1,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
    each: Each = one_by_one,
) -> tuple[SingularValues, Division]:
    """The singular values of J, from a symmetric matrix that is made and divided in the workspace.

    It is the Gram matrix of J's smaller side, or R K R^T, see the module. What the division neglected moves no square
    by more (Weyl), and is in the errors.

    Args:
        factors: what they are of.
        matrices: from `Factors.matrices`; not empty.
        space: see `stiffcore.eigen.divide`, as for the others.
        most: order that LAPACK may solve in memory.
        at_once: panels of a block.
        tell: told of what is done, panels done and panels in all.
        each: who works on the blocks.

    Raises:
        DivisionError: where no curve divides the matrix, or a part of it, or rounding leaves W^T W + d I indefinite.
    """
    kernels: dict[str, Any] = {"at_once": at_once, "each": each}
    order, shift, uncertainty, power = factors.order, 0, (0.0, 0.0), 0
    whole = partial(space.matrix, "whole", order, order)
    if factors.reduction is None:
        rows, power = _of_smaller_side(*matrices)
        _write_gram(sp.csc_array(rows.T), whole())
    else:
        shift = factors.reduction.shift
        matrices, power = _scaled_factors(factors, *matrices)

        def told(what: str) -> dict[str, Any]:
            return kernels | {"tell": partial(tell, f"{what} of order {order:,}")}

        def made() -> tuple[float, float]:
            w, v = _sides(factors, *matrices)
            size, weight = space.once("norms", lambda: _norms(w, v, shift))
            gram, root, turned = (space.matrix(name, order, order) for name in ("gram", "root", "turned"))
            _write_gram(w, gram)
            if not size:  # W is zero, and has no root
                panels.copy(gram, whole())
                return size, weight
            try:
                panels.cholesky(gram, root, shift=order * np.finfo(float).eps * size, **told("Cholesky's factor"))
            except SingularError as error:
                raise DivisionError(f"W^T W of its factors: {error}") from error
            panels.transpose(root, turned, tell=told("its transpose")["tell"], each=each)
            panels.product(root, partial(_inner_columns, v, shift, turned), whole(), **told("R K R^T"))
            return size, weight

        size, weight = space.once("made", made)
        uncertainty = _uncertainty(size, weight, order)
        space.drop("gram", "root", "turned")
    trace, norm = space.once("moments", lambda: [panels.trace(whole()), panels.norm(whole())])
    found = divide.eigenvalues(whole(), space, most, tell=tell, solve=_symmetric_eigenvalues, **kernels)
    exact = factors.ones, factors.count - order - factors.ones
    squares = found.values.real
    roots = _roots(factors, squares, trace, norm**2, exact, shift, most=uncertainty, neglected=found.error)
    return roots.times(power), found


def _write_gram(w: sp.csc_array, out: Panels) -> None:
    """out = W^T W."""
    rows = sp.csr_array(w.T)
    for i in out.missing():
        start, stop = out.columns(i)
        out.write(i, np.asfortranarray((rows @ w[:, start:stop]).toarray()))


def _inner_columns(v: sp.csc_array, shift: int, turned: Panels, start: int, stop: int) -> Array:
    """Columns start..stop-1 of K R^T, R^T in the workspace."""
    block = np.empty((turned.shape[0], stop - start), order="F")
    for i in range(turned.shards):
        left, right = turned.columns(i)
        if start <= left < stop:
            panel = turned.read_shard(i)
            # V^T of few columns at once: no more numbers than half of the panel
            group = max(1, turned.shape[0] * (right - left) // (2 * v.shape[1]))
            for at in range(0, right - left, group):
                done = _inner(v, shift, panel[:, at : at + group])
                block[:, left - start + at : left - start + at + done.shape[1]] = done
    return block


def _symmetric_eigenvalues(a: Array) -> Array:
    return scipy.linalg.eigvalsh((a + a.T) / 2, overwrite_a=True)


def _scaled_factors(factors: Factors, u: sp.csc_array, v: sp.csc_array) -> tuple[list[sp.csc_array], int]:
    """U and V as `_scaled` has them, where no identity stands beside their product."""
    if factors.reduction is not None and factors.reduction.shift:
        return [u, v], 0
    (u, of_u), (v, of_v) = _scaled(u), _scaled(v)
    return [u, v], of_u + of_v


def _sides(factors: Factors, u: sp.csc_array, v: sp.csc_array) -> tuple[sp.csc_array, sp.csc_array]:
    """W and V, in float64: U d and V / d have the same product; of equal norms, neither half of W drowns the other."""
    assert factors.reduction is not None
    u, v = u.astype(np.float64, copy=False), v.astype(np.float64, copy=False)
    balance = np.sqrt(_safe(_norms_along(v, 1)) / _safe(_norms_along(u, 0)))
    # products and columns of column-major matrices alone: SciPy takes other ways through triplets, of twice the memory
    u, v = u @ sp.diags_array(balance, format="csc"), sp.diags_array(1 / balance, format="csc") @ v
    if not factors.reduction.shift:
        return u, v
    inside = sp.csc_array(v[:, factors.rows].T)
    return sp.csc_array(sp.hstack([u, inside], format="csc")), v


def _norms_along(a: sp.csc_array, axis: int) -> Array:
    return np.asarray(np.sqrt(a.multiply(a).sum(axis=axis)))


def _inner(v: sp.csc_array, shift: int, x: Array) -> Array:
    """K x, x (2 k, columns); of a branch V V^T x."""
    if not shift:
        return v @ (v.T @ x)
    above, below = x[: v.shape[0]], x[v.shape[0] :]
    return np.concatenate([v @ (v.T @ above) + below, above])


def _norms(w: sp.csc_array, v: sp.csc_array, shift: int) -> tuple[float, float]:
    """|W|^2 and |K|, to a few per cent."""
    most = float((w.data**2).sum()), float((v.data**2).sum()) + shift
    return _norm(lambda x: w.T @ (w @ x), w.shape[1], most[0]), _norm(partial(_inner, v, shift), w.shape[1], most[1])


def _uncertainty(size: float, weight: float, times: int) -> tuple[float, float]:
    """What any eigenvalue of W K W^T may move by, |W|^2 = size, |K| = weight, where W^T W moves by times eps |W|^2.

    With more rows of W, sqrt(d) I, the matrix has more rows and columns: b = sqrt(d) |W| |K| is a bound of those off
    the diagonal block, and d |K| of that block. No eigenvalue moves by more than b (Weyl), and one that is x from those
    of the new block by no more than b^2 / x (Li and Li, Linear Algebra Appl. 395 (2005)). At 2 b or further from 0, as
    computed, x is at least a quarter of the eigenvalue, since d |K| is below b / 2.

    Returns:
        2 b, in float64 as all arithmetic here is, so that an eigenvalue moves by no more than the smaller of 2 b and
        (2 b)^2 / |value|; and |W|^2 |K|, in whose rounding that of U and V is.
    """
    return 2 * weight * size * np.sqrt(float(np.finfo(float).eps) * times), weight * size


def by_waist(factors: Factors, u: sp.csc_array, v: sp.csc_array) -> SingularValues:
    """The singular values of J = D (s I + U V), see the module.

    Memory: three dense matrices of order 2 k (s = 1) or k.
    """
    assert factors.reduction is not None
    (u, v), power = _scaled_factors(factors, u, v)
    shift, (w, v) = factors.reduction.shift, _sides(factors, u, v)
    size, weight = _norms(w, v, shift)
    gram, order = sp.csc_array(w.T @ w), w.shape[1]
    inner = sp.csc_array(v @ v.T)
    if shift:
        identity = sp.eye_array(v.shape[0], format="csc")
        inner = sp.block_array([[inner, identity], [identity, None]], format="csc")
    # pstrf leaves what it found of R in the upper triangle, rows beyond the rank are to be dropped
    r, pivots, rank, _ = lapack.dpstrf(np.asfortranarray(gram.toarray()), lower=0, overwrite_a=1)
    r = np.triu(r)[:rank]
    at = pivots - 1
    inner = sp.csc_array(inner[at][:, at])
    t = r @ (inner @ r.T)
    del r
    # pstrf drops what is below `order` times the rounding of W^T W
    most = _uncertainty(size, weight, order if rank < order else 1)
    zeros = factors.count - order - factors.ones
    return _from_squares(factors, t, factors.ones, zeros, shift, missing=order - rank, most=most).times(power)


def _norm(product: Callable[[Array], Array], order: int, most: float) -> float:
    """The 2-norm of a symmetric matrix, which is at most `most`, to a few per cent."""
    if order < 20:
        return float(np.linalg.norm(product(np.eye(order)), 2)) if order else 0.0
    start = np.random.default_rng(0).standard_normal(order)
    a = LinearOperator((order, order), product, dtype=np.dtype(np.float64))
    try:
        return float(np.abs(eigsh(a, k=1, which="LM", tol=1e-2, v0=start, return_eigenvectors=False)[0]))
    except ArpackError:  # a zero matrix, for one
        return most


def _safe(norms: Array) -> Array:
    return np.where(norms > 0, norms, 1.0)


def _from_squares(
    factors: Factors,
    t: Array,
    ones: int,
    zeros: int,
    shift: int = 0,
    *,
    missing: int = 0,
    most: tuple[float, float] = (0.0, 0.0),
) -> SingularValues:
    """Roots of shift + eig(T), and of `missing` more whose part of T is rounding; `most` is from `_uncertainty`."""
    t = (t + t.T) / 2
    trace, norm_square = float(np.trace(t)), float(np.einsum("ij,ij->", t, t))
    found = scipy.linalg.eigvalsh(t, overwrite_a=True) if len(t) else np.zeros(0)
    return _roots(factors, found, trace, norm_square, (ones, zeros), shift, missing=missing, most=most)


def _roots(
    factors: Factors,
    found: Array,
    trace: float,
    norm_square: float,
    exact: tuple[int, int],
    shift: int = 0,
    *,
    missing: int = 0,
    most: tuple[float, float] = (0.0, 0.0),
    neglected: float = 0.0,
) -> SingularValues:
    """See `_from_squares`: of the eigenvalues of T, which may be off by `neglected`, too; ones and zeros are exact."""
    sum_error = _relative(float(found.sum()), trace, float(np.abs(found).sum()))
    fourth_error = _relative(float((found**2).sum()), norm_square)
    found = np.sort(np.concatenate([found, np.zeros(missing)]))
    squares = np.maximum(shift + found, 0.0)
    near_zero, scale = most
    rounding = _solver_rounding(len(found)) * squares.max(initial=0) + ENTRY_ROUNDING * _eps(factors) * scale
    off = np.full(len(squares), rounding + neglected)
    if near_zero:
        with np.errstate(divide="ignore"):
            off += np.minimum(near_zero, near_zero**2 / np.abs(found))
    return SingularValues(np.sqrt(squares), *exact, root_errors(squares, off), sum_error, fourth_error)


def root_errors(squares: Array, off: Array) -> Array:
    """How far the root of a number in [s - off, s + off] is from that of s, at most; no such number is negative."""
    lower = np.sqrt(np.maximum(squares - off, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        # sqrt(s) - lower, without its cancellation; for s < off, sqrt(s) and sqrt(s + off) - sqrt(s) are <= sqrt(off)
        return np.where(squares > off, off / (np.sqrt(squares) + lower), np.sqrt(off))


def certify(factors: Factors, found: SingularValues, difference: float) -> Certificate:
    """Check singular values: sums of their powers, and the largest by Lanczos on products of the original function.

    Args:
        factors: what they are of.
        found: all of them.
        difference: from `Factors.difference`.
    """
    dtype = factors.jacobian.dtype
    largest = max(float(found.values.max(initial=0)), 1.0 if found.ones else 0.0)
    found = replace(found, errors=found.errors + factors.rounding)  # Weyl: so far does the rounding of J move any value
    failures, certified = [], []
    if largest > 0:
        top = _largest(factors.jacobian, int(np.frexp(largest)[1]))
        certified.append(replace(top, error=top.error + factors.rounding))
        if not abs(top.value.real - largest) <= RESIDUAL_TOLERANCE[dtype] * largest + factors.rounding:
            failures.append(f"the largest is {largest:.9g}, but Lanczos finds {top.value.real:.9g}")
    for name, error in (("squares", found.sum_error), ("squares' squares", found.fourth_error)):
        if error > RESIDUAL_TOLERANCE[dtype]:
            failures.append(f"the sum of the {name} misses the matrix's by {error:.1e}")
    # of J J^T r: J is applied twice
    if not difference * largest <= RESIDUAL_TOLERANCE[dtype] * largest + 2 * factors.rounding:
        failures.append(f"the matrix differs from products of the function by {difference:.1e}")
    ends = {"max": largest, "min": min(float(found.values.min(initial=np.inf)), 1.0 if found.ones else np.inf)}
    error = float(found.errors.max(initial=0))
    near = int(np.count_nonzero(found.values <= found.errors))
    condition_error = float("nan")
    if len(found.values):
        # how far beyond an end a value may lie
        above = float((found.values + found.errors).max()) - ends["max"]
        below = ends["min"] - float((found.values - found.errors).min())
        condition_error = stiffness_error(ends, max(above, 0.0), max(below, 0.0))
    return Certificate(
        certified=tuple(certified),
        trace_error=found.sum_error,
        square_error=found.fourth_error,
        reduction_check=difference,
        error=error,
        s_error=condition_error,
        s_active_error=condition_error,
        near_axis=near,
        axis_error=float(found.errors[found.values <= found.errors].max(initial=0)),
        failures=tuple(failures),
    )


def _largest(jacobian: Linearisation, power: int) -> Certified:
    """The largest singular value, near 2^power, by Lanczos (ARPACK) on products with J and its transpose."""
    x = jacobian.x

    def applied(product: Callable[[torch.Tensor], torch.Tensor], v: Array) -> Array:
        done = product(torch.as_tensor(v.reshape(1, -1), dtype=x.dtype, device=x.device))[0].cpu().double().numpy()
        return np.ldexp(done, -power)  # ARPACK squares them

    forward, reverse = partial(applied, jacobian.jvp), partial(applied, jacobian.vjp)
    shape = jacobian.m, jacobian.n
    if min(shape) < 3:
        value = np.linalg.norm(np.stack([forward(row) for row in np.eye(jacobian.n)], axis=1), 2)
        return Certified(complex(np.ldexp(value, power)), 0.0, 1.0, 0.0, True)
    operator = LinearOperator(shape, forward, rmatvec=reverse, dtype=np.dtype(np.float64))
    start = np.random.default_rng(0).standard_normal(min(shape))
    try:
        left, value, right = svds(operator, k=1, v0=start, tol=0 if x.dtype == torch.float64 else 1e-5)
    except ArpackError:
        return Certified(complex("nan"), float("inf"), 1.0, float("inf"), False)
    residual = float(np.ldexp(np.linalg.norm(forward(right[0]) - value[0] * left[:, 0]), power))
    top = float(np.ldexp(value[0], power))
    return Certified(complex(top), residual, 1.0, residual + torch.finfo(x.dtype).eps * top, True)


def _solver_rounding(order: int) -> float:
    return float(np.finfo(float).eps) * (SOLVER_ROUNDING + SOLVER_ROUNDING_PER_ROW * order)


def _eps(factors: Factors) -> float:
    return torch.finfo(factors.jacobian.x.dtype).eps


def _relative(a: float, b: float, scale: float | None = None) -> float:
    size = abs(b) if scale is None else scale
    return abs(a - b) / size if size else abs(a - b)
