"""The spectrum of a block triangular Jacobian: each diagonal block solved and certified alone, then put together.

Eigenvalues, counts and errors are those of the blocks (`stiffcore.jacobian.components`): exactly those of J. A large
coupling off the diagonal makes J far from normal, so that a dense solver of the whole loses digits of its blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from stiffcore.eigen import certificate, dense
from stiffcore.eigen.inclusion import FULL_ORDER, MOST_ORDER
from stiffcore.eigen.numerical_range import logarithmic_norm, range_bounds
from stiffcore.errors import StiffcoreError
from stiffcore.jacobian.reduction import Reduction
from stiffcore.spectra import CERTIFIED_MOST, Certificate, Moments, certified_choice

# Lines of failures that are told; the others are counted.
FAILURES_TOLD = 5


@dataclass(frozen=True)
class Part:
    """The eigenvalues of one diagonal block.

    Attributes:
        values: (k,) complex, those computed, of J, in the order of `dense.sort_eigenvalues`.
        ones: exact ones.
        zeros: exact zeros.
        certificate: of them.
        moments: of the matrix that was solved, shifted as J is.
        numerical_abscissa: of the same.
        distance: see `certificate.distance_of`.
        right: what the largest real part of those computed is between.
        left: what the negative of the smallest is between.
    """

    values: np.ndarray
    ones: int
    zeros: int
    certificate: Certificate
    moments: Moments
    numerical_abscissa: float
    distance: float
    right: tuple[float, float]
    left: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """All but the values, as JSON values."""
        return {
            "ones": self.ones,
            "zeros": self.zeros,
            "certificate": self.certificate.to_json(),
            "moments": [self.moments.trace, self.moments.trace_square, self.moments.frobenius],
            "numerical_abscissa": self.numerical_abscissa,
            "distance": self.distance,
            "between": [*self.right, *self.left],
        }

    @classmethod
    def from_json(cls, values: np.ndarray, fields: dict[str, Any]) -> "Part":
        """The inverse of `to_json`."""
        between = list(map(float, fields["between"]))
        return cls(
            values,
            int(fields["ones"]),
            int(fields["zeros"]),
            Certificate.from_json(fields["certificate"]),
            Moments(*map(float, fields["moments"])),
            float(fields["numerical_abscissa"]),
            float(fields["distance"]),
            *zip(between[::2], between[1::2], strict=True),
        )


def solve_part(reduction: Reduction, chunk: int) -> Part:
    """All eigenvalues of one diagonal block, certified, and located at orders up to `MOST_ORDER`; in memory.

    Args:
        reduction: of the block.
        chunk: columns built at once.

    Raises:
        StiffcoreError: where the matrix is not finite, or the QR iteration does not converge.
    """
    k, shift, dtype = reduction.k, float(reduction.shift), reduction.jacobian.dtype
    if not k:
        values, moments, abscissa = np.empty(0, np.result_type(dtype, np.complex64)), Moments(0.0, 0.0, 0.0), -np.inf
        located = None
        found = certificate.certify(reduction, values, np.empty(0, int), None, moments)
    else:
        a = np.empty((k, k), dtype, order="F")
        for start in range(0, k, chunk):
            a[:, start : start + chunk] = reduction.columns(start, min(start + chunk, k)).cpu().numpy()
        if not dense.is_finite(a):
            raise StiffcoreError(f"{reduction.jacobian.name}: the Jacobian is not finite")
        moments = certificate.matrix_moments(a)
        abscissa = logarithmic_norm(a.astype(np.float64))
        between = None if k <= FULL_ORDER else range_bounds(a.astype(np.float64), -shift, moments.frobenius)
        form = dense.to_hessenberg(a.copy(order="F"))
        again = dense.Hessenberg(form.a.copy(order="F"), form.tau, form.scale, form.ilo, form.ihi)
        values = dense.hessenberg_eigenvalues(again)
        chosen = certified_choice(values, reduction.shift)
        vectors = dense.hessenberg_eigenvectors(form, values[chosen])
        located = certificate.locate(reduction, values, a) if k <= MOST_ORDER else None
        found = certificate.certify(
            reduction, values, chosen, vectors, moments, matrix=a, real_parts=between, located=located
        )
    shifted = Moments(
        moments.trace + k * shift,
        moments.trace_square + 2 * shift * moments.trace + k * shift**2,
        float(np.sqrt(max(0.0, moments.frobenius**2 + 2 * shift * moments.trace + k * shift**2))),
    )
    right, left = certificate.ends_between(reduction, found.certified, located)
    return Part(
        right=right,
        left=left,
        values=dense.sort_eigenvalues(values + values.dtype.type(shift)),
        ones=reduction.ones,
        zeros=reduction.zeros,
        certificate=found,
        moments=shifted,
        numerical_abscissa=float(abscissa + shift),
        distance=certificate.distance_of(reduction),
    )


def united(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray, Certificate]:
    """The union of the blocks' spectra.

    Returns:
        All computed eigenvalues, sorted; (k,) int32, the part that each came from; and their certificate: of each kind
        of error the largest, counts added up, failures with the part's number.
    """
    values = np.concatenate([part.values for part in parts])
    source = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.values) for part in parts])
    order = np.lexsort((source, values.imag, values.real))
    values, source = values[order], source[order]
    ones, zeros = sum(part.ones for part in parts), sum(part.zeros for part in parts)
    found = [part.certificate for part in parts]
    everyone = tuple(c for one in found for c in one.certified)
    # whatever is near an end or the axis in the union is so in its part, where it was certified
    wanted = set(values[certified_choice(values, 0)].tolist())
    some = [c for c in everyone if c.value in wanted][:CERTIFIED_MOST]
    failures = [f"part {i}: {line}" for i, one in enumerate(found) for line in one.failures]
    if len(failures) > FAILURES_TOLD:
        failures = [*failures[:FAILURES_TOLD], f"and {len(failures) - FAILURES_TOLD} more"]
    sides = ([part.right for part in parts if part.values.size], [part.left for part in parts if part.values.size])
    right, left = (
        (max((low for low, _ in side), default=-np.inf), max((high for _, high in side), default=-np.inf))
        for side in sides
    )
    exact = cast(Reduction, SimpleNamespace(shift=0, ones=ones, zeros=zeros))
    return (
        values,
        source,
        Certificate(
            certified=tuple(some),
            trace_error=_most(one.trace_error for one in found),
            square_error=_most(one.square_error for one in found),
            reduction_check=_most(one.reduction_check for one in found),
            error=_most(one.error for one in found),
            s_error=certificate.ratio_error(exact, values, right, left, structural=True),
            s_active_error=certificate.ratio_error(exact, values, right, left, structural=False),
            near_axis=sum(one.near_axis for one in found),
            axis_error=_most(one.axis_error for one in found),
            failures=tuple(failures),
            negative=_counted([one.negative for one in found]),
            outside=_counted([one.outside for one in found]),
        ),
    )


def united_moments(parts: Sequence[Part]) -> tuple[Moments, float]:
    """The moments and the numerical abscissa of the block diagonal matrix."""
    moments = [part.moments for part in parts]
    return (
        Moments(
            sum(m.trace for m in moments),
            sum(m.trace_square for m in moments),
            float(np.sqrt(sum(m.frobenius**2 for m in moments))),
        ),
        _most(part.numerical_abscissa for part in parts),
    )


def _most(values: Any) -> float:
    listed = [float(v) for v in values]
    return max((v for v in listed if not np.isnan(v)), default=float("nan"))


def _counted(bounds: list[tuple[int, int] | None]) -> tuple[int, int] | None:
    known = [b for b in bounds if b is not None]
    return (sum(b[0] for b in known), sum(b[1] for b in known)) if len(known) == len(bounds) else None
