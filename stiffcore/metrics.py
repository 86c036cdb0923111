"""What is read off a spectrum: the stiffness index, the shares by sign, and the extremes. From stored spectra alone.

The stiffness index is Eq. 10 of "Block-level stiffness analysis of residual networks" (after Kim et al. 2021),
`S = max Re / min Re`. Structural zeros (outputs that a ReLU holds at zero) make it infinite wherever no eigenvalue
has negative real part, so `S_active` gives the same ratio without them. The paper's Eq. 11 counts Re > 0 but its
text and tables mean Re < 0: all three shares are given, and add up to 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    "condition",
    "effective_rank",
    "nuclear_norm",
    "frobenius_norm",
    "negative_low",
    "negative_high",
    "euler_stable_low",
    "euler_stable_high",
)


# Ten bins a decade on either side of 0, so that histograms of any spectra can be added; what is smaller than 1e-16 in
# modulus is in the bin that holds 0, what is larger than 1e8 in the outermost ones.
HISTOGRAM_EDGES = np.concatenate([[-np.inf], -np.logspace(8, -16, 241), np.logspace(-16, 8, 241), [np.inf]])


def spectrum_metrics(
    computed: np.ndarray,
    ones: int,
    zeros: int,
    *,
    branch: bool,
    shift: int = 0,
    frobenius: float = float("nan"),
    numerical_abscissa: float = float("nan"),
    axis_error: float = 0.0,
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
        axis_error: eigenvalues that are nearer to Re = 0 may be on either side of it, or on it.

    Returns:
        By name, see `NAMES`: `S` and `S_active` (may be inf, -inf or nan); `negative`, `positive`, `zero` (shares of
        all n eigenvalues); `abscissa` (max Re), `min_re`, `min_re_active` (without structural zeros), `radius`
        (max |l|), `max_im` (max |Im|); `negative_low`, `negative_high`, `euler_stable_low` and `euler_stable_high`
        (between which `negative` and `euler_stable` are certain to be: `Spectrum.metrics` puts in what the certificate
        says, here they are the shares themselves); `euler_stable` (share with |1 + l| <= 1, forward Euler's stability
        disc at step 1; nan where not `branch`). Empty sets give nan. Of the eigenvalues with negative real part alone,
        beyond `axis_error`: `decay_ratio`, max |Re| / min |Re|, the stiffness ratio of textbooks (Lambert, Numerical
        Methods for Ordinary Differential Systems, 1991, section 6.2), and `stable_step`, the largest step at which
        forward Euler damps them all, min -2 Re / |l|^2 (nan where not `branch`, inf where there are none). Of the
        matrix that was solved, which has another basis than J: `departure` from normality, sqrt(|M|_F^2 - sum |l|^2)
        (Henrici, Numer. Math. 4 (1962); below 1e-8 |M|_F it is rounding), and `numerical_abscissa`, its logarithmic
        2-norm: the initial growth rate of x' = M x. nan: `condition` and the norms, see `singular_metrics`.
    """
    tally = Tally(axis_error)
    tally.add(computed, shift)
    return tally.metrics(ones, zeros, branch=branch, frobenius=frobenius, numerical_abscissa=numerical_abscissa)


@dataclass
class Tally:
    """What the metrics need of eigenvalues that come in parts, and need not be kept.

    Attributes:
        axis_error: as for `spectrum_metrics`.
        count: eigenvalues added.
        negative: how many of them have Re < 0.
        positive: how many have Re > 0.
        inside: how many have |1 + l| <= 1.
        histogram: (bins,) how many real parts lie in each bin of `HISTOGRAM_EDGES`, a bin without its right edge.
    """

    axis_error: float = 0.0
    count: int = 0
    negative: int = 0
    positive: int = 0
    inside: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64))
    _ends: dict[str, float] = field(default_factory=dict)
    _scale: float = 0.0
    _squares: float = 0.0

    def add(self, values: np.ndarray, shift: int = 0, unsure: np.ndarray | None = None) -> None:
        """Count some more.

        Args:
            values: (m,) complex.
            shift: of the matrix whose eigenvalues they are, as for `spectrum_metrics`.
            unsure: (m,) bool, those that may be on either side of Re = 0, beside those within `axis_error`.
        """
        if not len(values):
            return
        real, modulus = values.real, np.abs(values)
        decaying = real < -self.axis_error
        if unsure is not None:
            decaying &= ~unsure
        self.count += len(values)
        self.histogram += np.bincount(
            np.searchsorted(HISTOGRAM_EDGES, real, side="right") - 1, minlength=len(self.histogram)
        )
        self.negative += int(np.count_nonzero(real < 0))
        self.positive += int(np.count_nonzero(real > 0))
        self.inside += int(np.count_nonzero(np.abs(1 + values) <= 1))
        found = {"max_re": real.max(), "-min_re": -real.min(), "radius": modulus.max(), "im": np.abs(values.imag).max()}
        if decaying.any():
            found["slowest"] = real[decaying].max()
            found["-step"] = -_stable_step(values[decaying])
        self._put_ends(found)
        self._add_squares(np.abs(values.astype(np.complex128) - shift))

    def add_counted(self, counts: Mapping[str, int], ends: Mapping[str, float], histogram: np.ndarray) -> None:
        """Count some more that were counted elsewhere, with no shift, an `axis_error` of 0, and none unsure.

        Args:
            counts: `found`, `negative`, `positive` and `inside`.
            ends: as `add` finds them, and `modulus_square`, the sum of |l|^2.
            histogram: as the attribute.
        """
        self.count += counts["found"]
        self.negative += counts["negative"]
        self.positive += counts["positive"]
        self.inside += counts["inside"]
        self.histogram += histogram
        self._put_ends({name: value for name, value in ends.items() if name != "modulus_square"})
        self._add_squares(np.array([math.sqrt(ends["modulus_square"])]))

    def _put_ends(self, found: Mapping[str, float]) -> None:
        for name, value in found.items():
            self._ends[name] = max(self._ends.get(name, -math.inf), float(value))

    def _add_squares(self, modulus: np.ndarray) -> None:
        """Scaled, so that squares of tiny or huge numbers keep (as BLAS' nrm2)."""
        scale = max(self._scale, float(modulus.max()))
        if 0 < scale < math.inf:
            self._squares = self._squares * (self._scale / scale) ** 2 + float(((modulus / scale) ** 2).sum())
            self._scale = scale

    def metrics(
        self,
        ones: int,
        zeros: int,
        *,
        branch: bool,
        frobenius: float = float("nan"),
        numerical_abscissa: float = float("nan"),
    ) -> dict[str, float]:
        """The metrics of all that was added, and so many exact ones and zeros; see `spectrum_metrics`."""
        n = self.count + ones + zeros
        exact = [1.0] * min(ones, 1)
        ends = self._ends
        computed = [ends["max_re"], -ends["-min_re"]] if ends else []
        active = np.array(computed + exact)
        everything = np.concatenate([active, np.zeros(min(zeros, 1))])
        modulus = np.concatenate([[ends["radius"]] if ends else [], everything[len(computed) :]])
        slowest, step = ends.get("slowest", math.nan), -ends.get("-step", -math.inf)
        with np.errstate(over="ignore"):
            decay = float(np.float64(-ends.get("-min_re", math.nan)) / np.float64(slowest))
        negative, stable = _share(self.negative, n), _share(self.inside + zeros, n) if branch else float("nan")
        certain = {"negative_low": negative, "negative_high": negative}
        certain |= {"euler_stable_low": stable, "euler_stable_high": stable}
        of_singular_values = dict.fromkeys(
            ("condition", "effective_rank", "nuclear_norm", "frobenius_norm"), float("nan")
        )
        found = {
            "S": stiffness_index(everything),
            "S_active": stiffness_index(active),
            "negative": negative,
            "positive": _share(self.positive + ones, n),
            "zero": _share(self.count - self.negative - self.positive + zeros, n),
            "abscissa": _largest(everything),
            "min_re": -_largest(-everything) + 0.0,
            "min_re_active": -_largest(-active) + 0.0,
            "radius": _largest(modulus),
            "max_im": _largest(np.array(([ends["im"]] if ends else []) + [0.0] * min(ones + zeros, 1))),
            "euler_stable": stable,
            "decay_ratio": decay,
            "stable_step": step if branch else float("nan"),
            "departure": self._departure(frobenius),
            "numerical_abscissa": numerical_abscissa,
        }
        return found | of_singular_values | certain

    def _departure(self, frobenius: float) -> float:
        if not frobenius > 0:
            return frobenius
        share = (self._scale / frobenius) ** 2 * self._squares
        return frobenius * math.sqrt(max(0.0, 1 - share))


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
        known["negative"] = known["negative_low"] = known["negative_high"] = _share(negative, n)
        known["positive"] = _share(k - negative + ones, n)
        known["zero"] = _share(zeros, n)
    if branch and outside is not None:
        inside = _share(n - outside - ones, n)
        known |= dict.fromkeys(("euler_stable", "euler_stable_low", "euler_stable_high"), inside)
    return {name: known.get(name, float("nan")) for name in NAMES}


def singular_metrics(values: np.ndarray, ones: int, zeros: int) -> dict[str, float]:
    """The metrics of singular values; those of eigenvalues are nan.

    Args:
        values: (k,) those that were computed.
        ones: how many more are exactly 1.
        zeros: how many more are exactly 0.

    Returns:
        By name, see `NAMES`: `condition`, the largest over the smallest without the exact zeros; `effective_rank`, the
        exponential of the entropy of their shares of the sum (Roy & Vetterli, EUSIPCO 2007); `nuclear_norm`, their
        sum; `frobenius_norm`; `radius`, the largest; `positive` and `zero`, shares of all min(m, n).
    """
    total = len(values) + ones + zeros
    active = np.concatenate([values, np.ones(ones)])
    largest, scale = _largest(active), float(active.max(initial=0.0)) or 1.0
    weights = active[active > 0] / active.sum() if active.sum() else np.zeros(0)
    found = {
        "condition": stiffness_index(active),
        "effective_rank": float(np.exp(-(weights * np.log(weights)).sum())) if len(weights) else 0.0,
        "nuclear_norm": float(active.sum()),
        "frobenius_norm": scale * float(np.sqrt(((active / scale) ** 2).sum())),
        "radius": largest,
        "positive": _share(np.count_nonzero(active > 0), total),
        "zero": _share(total - np.count_nonzero(active > 0), total),
    }
    return {name: found.get(name, float("nan")) for name in NAMES}


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


def spell_share(values: Mapping[str, float], name: str, digits: int = 3) -> str:
    """A share for people, in per cent: with what it is between where it is not certain, `open` where it is not known.

    Args:
        values: metrics by name, with the ends of the interval as `NAME_low` and `NAME_high`, where there are any.
        name: of the share.
        digits: after the point.
    """
    share, low, high = (float(values.get(key, math.nan)) for key in (name, f"{name}_low", f"{name}_high"))
    shown = "open" if math.isnan(share) else f"{100 * share:.{digits}f}"
    if math.isnan(low) or low == high:
        return shown
    return f"{shown} ({100 * low:.{digits}f} to {100 * high:.{digits}f})"


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


def _stable_step(decaying: np.ndarray) -> float:
    exactly = decaying.astype(np.complex128)
    with np.errstate(over="ignore", divide="ignore", under="ignore"):
        modulus = np.abs(exactly)
        return float((-2 * (exactly.real / modulus) / modulus).min())


def _share(count: int | np.integer, n: int) -> float:
    return float(count) / n if n else float("nan")


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if len(values) else float("nan")
