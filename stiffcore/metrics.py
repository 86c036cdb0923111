"""What is read off a spectrum: the stiffness index, the shares by sign, and the extremes. From stored spectra alone.

The stiffness index is Eq. 10 of "Block-level stiffness analysis of residual networks" (after Kim et al. 2021),
`S = max Re / min Re`. Structural zeros (outputs that a ReLU holds at zero) make it infinite wherever no eigenvalue
has negative real part, so `S_active` gives the same ratio without them. The paper's Eq. 11 counts Re > 0 but its
text and tables mean Re < 0: all three shares are given, and add up to 1.
"""

from collections.abc import Mapping

import numpy as np

NAMES = (
    "S",
    "S_active",
    "negative",
    "positive",
    "zero",
    "abscissa",
    "min_re",
    "min_re_active",
    "radius",
    "max_im",
    "euler_stable",
    "decay_ratio",
    "stable_step",
    "departure",
    "numerical_abscissa",
)


def spectrum_metrics(
    computed: np.ndarray,
    ones: int,
    zeros: int,
    *,
    branch: bool,
    shift: int = 0,
    frobenius: float = float("nan"),
    numerical_abscissa: float = float("nan"),
) -> dict[str, float]:
    """The metrics of one spectrum.

    Args:
        computed: (k,) complex, the eigenvalues that were computed.
        ones: how many more are exactly 1.
        zeros: how many more are exactly 0 (structural zeros).
        branch: whether it is the Jacobian of an ODE's right-hand side, so that `euler_stable` and `stable_step` have
            a meaning.
        shift: what was added to the eigenvalues of M, the matrix that was solved.
        frobenius: norm of M; nan where unknown.
        numerical_abscissa: of that matrix, shifted as its eigenvalues are; nan where unknown.

    Returns:
        By name, see `NAMES`: `S` and `S_active` (may be inf, -inf or nan); `negative`, `positive`, `zero` (shares of
        all n eigenvalues); `abscissa` (max Re), `min_re`, `min_re_active` (without structural zeros), `radius`
        (max |l|), `max_im` (max |Im|); `euler_stable` (share with |1 + l| <= 1, forward Euler's stability disc
        at step 1; nan where not `branch`). Empty sets give nan. Of the eigenvalues with negative real part alone:
        `decay_ratio`, max |Re| / min |Re|, the stiffness ratio of textbooks (Lambert, Numerical Methods for Ordinary
        Differential Systems, 1991, section 6.2), and `stable_step`, the largest step at which forward Euler damps them
        all, min -2 Re / |l|^2 (nan where not `branch`, inf where there are none). Of the matrix that was solved, which
        has another basis than J: `departure` from normality, sqrt(|M|_F^2 - sum |l|^2) (Henrici, Numer. Math. 4
        (1962); below 1e-8 |M|_F it is rounding), and `numerical_abscissa`, its logarithmic 2-norm: the initial growth
        rate of x' = M x.
    """
    n = len(computed) + ones + zeros
    active = np.concatenate([computed.real, np.ones(min(ones, 1))])
    everything = np.concatenate([active, np.zeros(min(zeros, 1))])
    modulus = np.concatenate([np.abs(computed), everything[len(computed) :]])
    inside = int(np.count_nonzero(np.abs(1 + computed) <= 1)) + zeros
    return {
        "S": stiffness_index(everything),
        "S_active": stiffness_index(active),
        "negative": _share(np.count_nonzero(computed.real < 0), n),
        "positive": _share(np.count_nonzero(computed.real > 0) + ones, n),
        "zero": _share(np.count_nonzero(computed.real == 0) + zeros, n),
        "abscissa": _largest(everything),
        "min_re": -_largest(-everything) + 0.0,
        "min_re_active": -_largest(-active) + 0.0,
        "radius": _largest(modulus),
        "max_im": _largest(np.concatenate([np.abs(computed.imag), np.zeros(min(ones + zeros, 1))])),
        "euler_stable": _share(inside, n) if branch else float("nan"),
        "decay_ratio": _decay_ratio(computed.real[computed.real < 0]),
        "stable_step": _stable_step(computed[computed.real < 0]) if branch else float("nan"),
        "departure": _departure(computed - shift, frobenius),
        "numerical_abscissa": numerical_abscissa,
    }


def extreme_metrics(
    found: np.ndarray,
    k: int,
    ones: int,
    zeros: int,
    *,
    negative: int | None,
    outside: int | None,
    radius: float,
    branch: bool,
    numerical_abscissa: float = float("nan"),
) -> dict[str, float]:
    """The metrics that the ends of a spectrum and proved counts give; nan for those that need the rest.

    Args:
        found: (m,) complex, the computed eigenvalues, those with the largest and the smallest real part among them.
        k: how many there are of which these are the ends; at least 1.
        ones: how many more are exactly 1.
        zeros: how many more are exactly 0.
        negative: how many of the k have a negative real part, where proved; none of them is then at 0.
        outside: how many of the k have |1 + l| > 1, where proved.
        radius: the largest modulus of the k; nan where unknown.
        branch: as for `spectrum_metrics`.
        numerical_abscissa: as for `spectrum_metrics`.

    Returns:
        As `spectrum_metrics`.
    """
    n = k + ones + zeros
    ends = spectrum_metrics(found, ones, zeros, branch=branch)
    known = {name: ends[name] for name in ("S", "S_active", "abscissa", "min_re", "min_re_active")}
    known["numerical_abscissa"] = numerical_abscissa
    known["radius"] = float(np.maximum(radius, 1.0 if ones else 0.0))
    if negative is not None:
        known["negative"] = _share(negative, n)
        known["positive"] = _share(k - negative + ones, n)
        known["zero"] = _share(zeros, n)
    if branch and outside is not None:
        known["euler_stable"] = _share(n - outside - ones, n)
    return {name: known.get(name, float("nan")) for name in NAMES}


def stiffness_index(real_parts: np.ndarray) -> float:
    """`max Re / min Re` (Eq. 10), by IEEE rules: a zero minimum gives inf (nan where the maximum is zero too)."""
    if not len(real_parts):
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return float(np.float64(real_parts.max()) / np.float64(real_parts.min() + 0.0)) + 0.0


def spell(value: float, digits: int = 5) -> str:
    """A number for people: infinities and nan in words, the rest with `digits` significant digits."""
    if np.isnan(value):
        return "undefined"
    if np.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return f"{value:.{digits}g}"


def stiffness_error(values: Mapping[str, float], error_max: float, error_min: float) -> float:
    """How far `max Re / min Re` may be off, from the errors of its two ends.

    A bound, not only first order: near a zero minimum, where S is largest, first order would promise too much.

    Args:
        values: with `max` and `min`, the two real parts.
        error_max: of the largest real part.
        error_min: of the smallest real part.

    Returns:
        `(error_max + |max| error_min / |min|) / (|min| - error_min)`; inf where the minimum is within its error of
        zero, 0 where both ends are exact.
    """
    if error_max == 0 and error_min == 0:
        return 0.0
    top, bottom = abs(float(values["max"])), abs(float(values["min"]))
    if not bottom > error_min:
        return float("inf")
    with np.errstate(over="ignore"):
        return float((error_max + np.float64(top) / bottom * error_min) / np.float64(bottom - error_min))


def _decay_ratio(negative: np.ndarray) -> float:
    if not len(negative):
        return float("nan")
    with np.errstate(over="ignore"):
        return float(np.float64(negative.min()) / np.float64(negative.max()))


def _stable_step(decaying: np.ndarray) -> float:
    if not len(decaying):
        return float("inf")
    exactly = decaying.astype(np.complex128)
    with np.errstate(over="ignore", divide="ignore", under="ignore"):
        modulus = np.abs(exactly)
        return float((-2 * (exactly.real / modulus) / modulus).min())


def _departure(m: np.ndarray, frobenius: float) -> float:
    """From eigenvalues of M, scaled so that squares of tiny norms do not vanish."""
    if not frobenius > 0:
        return frobenius
    share = float((np.abs(m.astype(np.complex128) / frobenius) ** 2).sum())
    return frobenius * float(np.sqrt(max(0.0, 1 - share)))


def _share(count: int | np.integer, n: int) -> float:
    return float(count) / n if n else float("nan")


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if len(values) else float("nan")
