"""All eigenvalues of very many very small matrices: counted, tallied, and their extremes checked.

For the slices of a Jacobian (`stiffcore.jacobian.slices`): millions of squares of order 1 to 7, by code that is
compiled for them (`eigen.small`). LAPACK's geev takes what is larger, and those few about which that code is in doubt:
where a sign may be rounding, eigenvectors decide. What decides S is kept with its square, so that it can be checked on
the original function.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from stiffcore.eigen.certificate import TRACE_TOLERANCE
from stiffcore.errors import InputError
from stiffcore.jacobian.reduction import PROBE_TOLERANCE
from stiffcore.jacobian.slices import PRODUCTS_AT_ONCE, Slices, Squares
from stiffcore.metrics import Tally, stiffness_error
from stiffcore.spectra import EACH_END, Certificate, Certified

if TYPE_CHECKING:
    from stiffcore.eigen.squares import Taken

Array = NDArray[np.floating]
BATCH = 1 << 16
# Orders that compiled code takes: `eigen.squares`, which is imported where there are such squares.
MOST_ORDER = 8
# What an entry may be off by, beside its square's rounding: sums over windows, in units of the largest entry there.
ENTRY_ROUNDING = 4


@dataclass(frozen=True)
class Extreme:
    """An eigenvalue at an end of the spectrum, and where it comes from.

    Attributes:
        value: the eigenvalue.
        unit: flat index of the output unit.
        channel: of the input.
        first: first row and column of the square.
        square: (w, w).
    """

    value: complex
    unit: int
    channel: int
    first: int
    square: Array


@dataclass
class WindowSpectrum:
    """The eigenvalues of squares that come in parts.

    Attributes:
        keep: whether the values themselves are kept.
        take: solves small squares, as `eigen.squares.take`, which does where it is None.
        tally: of the eigenvalues that are not zero.
        near_axis: how many of them have a real part within its error of 0.
        axis_error: the largest of these errors.
        frobenius: the norm of all squares together.
    """

    keep: bool
    take: Callable[..., "Taken"] | None = None
    tally: Tally = field(default_factory=Tally)
    near_axis: int = 0
    axis_error: float = 0.0
    frobenius: float = 0.0
    _parts: list[np.ndarray] = field(default_factory=list)
    _ends: dict[str, list[Extreme]] = field(default_factory=lambda: {"right": [], "left": []})
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(4))  # of values, squares, and their two traces

    @property
    def extremes(self) -> list[Extreme]:
        """Those with the largest and the smallest real parts, a few at either end, each once."""
        found = {(e.unit, e.channel, e.value): e for end in self._ends.values() for e in end}
        return list(found.values())

    def values(self) -> np.ndarray:
        """(k,) complex, all eigenvalues that are not zero, where they were kept; gives them away."""
        parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.zeros(0, complex)

    def add(self, squares: Squares) -> None:
        """Find the eigenvalues of some more.

        Raises:
            InputError: where a number is not finite.
        """
        w = squares.values.shape[-1]
        if w <= MOST_ORDER:
            self._add_small(squares)
            return
        flat = squares.values.reshape(-1, w, w)
        present = np.flatnonzero(np.any(flat, axis=(1, 2)))
        scale = _finite(float(np.abs(squares.values).max(initial=0)))
        for start in range(0, len(present), BATCH):
            which = present[start : start + BATCH]
            self._add(np.ascontiguousarray(flat[which]), squares, which, scale)

    def _add_small(self, squares: Squares) -> None:
        """By compiled code; what that is in doubt about, by LAPACK."""
        from stiffcore.eigen import squares as small_squares  # compiles, or reads what was compiled

        take = self.take or small_squares.take
        units, channels = squares.values.shape[:2]
        values = squares.values.transpose(0, 2, 3, 1)
        scale = _finite(small_squares.largest_entry(values))
        for start in range(0, units * channels, BATCH):
            stop = min(start + BATCH, units * channels)
            part = take(values, start, stop, scale, EACH_END)
            self._sums += part.sums
            self.frobenius = float(np.hypot(self.frobenius, part.norm))
            if len(part.values):
                self.tally.add_counted(part.counts, part.ends, part.histogram)
                if self.keep:
                    self._parts.append(part.values)
                for end, chosen in part.few.items():
                    self._keep_ends(end, [self._extreme(z, squares, at) for z, at in chosen])
            if len(which := part.doubtful):
                unit, channel = np.divmod(which, channels)
                self._add(np.ascontiguousarray(squares.values[unit, channel]), squares, which, scale)

    def _add(self, a: Array, squares: Squares, which: np.ndarray, scale: float) -> None:
        values = torch.linalg.eigvals(torch.from_numpy(a)).numpy()
        exactly, wide = a.astype(np.float64), values.astype(np.complex128)
        self._sums += [
            wide.real.sum(),
            (wide.real**2 - wide.imag**2).sum(),
            np.einsum("sii->", exactly),
            np.einsum("sij,sji->", exactly, exactly),
        ]
        largest = np.abs(exactly).max(axis=(1, 2))
        norms = largest * np.sqrt(np.einsum("sij,sij->s", *2 * (exactly / largest[:, None, None],)))
        self.frobenius = float(np.hypot(self.frobenius, np.linalg.norm(norms)))
        unsure = self._unsure(exactly, wide, norms, scale, float(np.finfo(a.dtype).eps))
        nonzero = values != 0
        kept = values[nonzero]
        if not len(kept):
            return
        self.tally.add(kept, unsure=unsure[nonzero])
        if self.keep:
            self._parts.append(kept)
        row = np.nonzero(nonzero)[0]
        few = min(EACH_END, len(kept))
        ends = np.argpartition(-kept.real, few - 1)[:few], np.argpartition(kept.real, few - 1)[:few]
        for end, chosen in (("right", np.sort(ends[0])), ("left", np.sort(ends[1]))):
            self._keep_ends(end, [self._extreme(kept[i], squares, int(which[row[i]])) for i in chosen])

    def _keep_ends(self, end: str, more: list[Extreme]) -> None:
        sign = -1 if end == "right" else 1
        self._ends[end] = sorted([*self._ends[end], *more], key=lambda e: sign * e.value.real)[:EACH_END]

    @staticmethod
    def _extreme(value: complex, squares: Squares, at: int) -> Extreme:
        unit, channel = divmod(at, squares.values.shape[1])
        square = squares.values[unit, channel].copy()
        return Extreme(complex(value), int(squares.units[unit]), channel, squares.first, square)

    def _unsure(self, a: Array, values: np.ndarray, norms: Array, scale: float, eps: float) -> np.ndarray:
        """Find and count real parts whose sign is within the rounding of their square, by its values' conditions."""
        w = a.shape[1]
        rounding = eps * (w * norms + ENTRY_ROUNDING * scale)
        # whatever its condition, an eigenvalue moves by the w-th root of rounding at most
        most = norms * (rounding / norms) ** (1 / w)
        near = (np.abs(values.real) <= most[:, None]) & (values != 0)
        rows = np.flatnonzero(near.any(axis=1))
        if not len(rows):
            return near
        # values by eig need not be those of eigvals to the last bit: each is given its nearest one's condition
        again, vectors = torch.linalg.eig(torch.from_numpy(a[rows]))
        inverse, _ = torch.linalg.inv_ex(vectors)
        conditions = (vectors.norm(dim=1) * inverse.norm(dim=2)).nan_to_num(torch.inf, torch.inf).numpy()
        nearest = np.abs(values[rows][:, :, None] - again.numpy()[:, None, :]).argmin(axis=2)
        with np.errstate(invalid="ignore"):
            errors = np.fmin(np.take_along_axis(conditions, nearest, 1) * rounding[rows, None], most[rows, None])
        near[rows] &= np.abs(values[rows].real) <= errors
        self.near_axis += int(near.sum())
        self.axis_error = max(self.axis_error, float(errors[near[rows]].max(initial=0.0)))
        return near

    def certificate(self, slices: Slices, difference: float) -> Certificate:
        """Check the sums, and the ends on the original function.

        Args:
            slices: what the squares are of.
            difference: from `RandomCheck`; 0 where each row is a product.
        """
        dtype = slices.jacobian.dtype
        eps = torch.finfo(slices.jacobian.x.dtype).eps
        wholes = _whole_slices(slices, extremes := self.extremes)
        certified = tuple(_certified(*pair, eps) for pair in zip(wholes, extremes, strict=True))
        value, square, trace, trace_square = self._sums
        scale = max(self.frobenius, float(np.finfo(np.float64).tiny))
        trace_error, square_error = abs(value - trace) / scale, abs(square - trace_square) / scale / scale
        failures = [f"{c.value:.6g} is not an eigenvalue of its slice" for c in certified if not c.converged]
        # sums over many squares: each rounds by itself
        for name, error in (("sum", trace_error), ("sum of squares", square_error)):
            if not error <= TRACE_TOLERANCE[dtype]:
                failures.append(f"the eigenvalues' {name} misses that of the traces by {error:.1e}")
        if not difference <= PROBE_TOLERANCE[slices.jacobian.x.dtype]:
            failures.append(f"the squares differ from products of the function by {difference:.1e}")
        errors = {end: _largest_error(certified, found) for end, found in self._ends.items()}
        real = [c.value.real for c in certified]
        s_active_error = float("nan")
        if real:
            ends = {"max": max(real), "min": min(real)}
            s_active_error = stiffness_error(ends, errors["right"], errors["left"])
        zeros = slices.count > self.tally.count
        # with structural zeros, and no eigenvalue left of them, S is infinite exactly
        s_error = 0.0 if zeros and errors["left"] < min(real, default=1.0) else s_active_error
        return Certificate(
            certified=certified,
            trace_error=trace_error,
            square_error=square_error,
            reduction_check=difference,
            error=max((c.error for c in certified), default=0.0),
            s_error=s_error,
            s_active_error=s_active_error,
            near_axis=self.near_axis,
            axis_error=self.axis_error,
            failures=tuple(failures),
        )


def _finite(largest: float) -> float:
    if not np.isfinite(largest):
        raise InputError("the Jacobian has entries that are not finite here: no eigenvalues, choose another image")
    return largest


def _largest_error(certified: tuple[Certified, ...], found: list[Extreme]) -> float:
    values = {e.value for e in found}
    return max((c.error for c in certified if c.value in values), default=0.0)


def _whole_slices(slices: Slices, extremes: list[Extreme]) -> Iterator[Array]:
    """(H, W) of each, as products of the original function give it."""
    for start in range(0, len(extremes), PRODUCTS_AT_ONCE):
        part = extremes[start : start + PRODUCTS_AT_ONCE]
        rows = slices.rows(np.array([extreme.unit for extreme in part]))
        yield from (rows[i, extreme.channel].astype(np.float64) for i, extreme in enumerate(part))


def _certified(whole: Array, extreme: Extreme, eps: float) -> Certified:
    """Check one eigenvalue on its whole slice, as a product of the original function gives it.

    An eigenvector of the square is that of the slice, restricted to the square: A v / l is the rest of it.
    """
    square = extreme.square.astype(np.float64)
    norm = float(np.linalg.norm(whole))
    bound = norm * (len(square) * eps) ** (1 / len(square))
    if abs(extreme.value) <= bound and abs(extreme.value) <= 1e4 * eps * norm:  # rounding of an eigenvalue 0
        return Certified(extreme.value, abs(extreme.value), float("inf"), bound, True)
    values, vectors = np.linalg.eig(square)
    i = int(np.argmin(np.abs(values - extreme.value)))
    others, lefts = np.linalg.eig(square.T)
    j = int(np.argmin(np.abs(others - extreme.value)))
    x, y = np.zeros(len(whole), complex), np.zeros(len(whole), complex)
    inside = slice(extreme.first, extreme.first + len(square))
    x[inside], y[inside] = vectors[:, i], lefts[:, j]
    x, y = whole @ x / extreme.value, whole.T @ y / extreme.value
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    with np.errstate(all="ignore"):
        x, y = x / lengths[0], y / lengths[1]
        residual = float(np.linalg.norm(whole @ x - extreme.value * x))
        condition = float(1 / abs(y @ x))
        error = condition * (residual + eps * norm)
    good = residual <= 1e4 * eps * norm
    return Certified(
        value=extreme.value,
        residual=residual if np.isfinite(residual) else float("inf"),
        condition=condition if np.isfinite(condition) else float("inf"),
        error=error if np.isfinite(error) else float("inf"),
        converged=bool(good),
    )
