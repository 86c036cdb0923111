"""The eigenvalues of one Jacobian, with what is exact about them and how far the rest can be trusted."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from stiffcore.errors import InputError
from stiffcore.metrics import NAMES, extreme_metrics, singular_metrics, spectrum_metrics, spell, spell_share
from stiffcore.study import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# An S whose error is more than this share of it is not determined.
DOUBTFUL = 0.1
# Eigenvalues certified: so many at either end, so many nearest Re = 0, and so many nearest it on either side.
EACH_END = 3
NEAREST = 8
CERTIFIED_MOST = 4 * EACH_END + NEAREST


def certified_choice(values: np.ndarray, shift: int) -> np.ndarray:
    """Which eigenvalues to certify: those that set S, and those whose sign might be in doubt.

    Args:
        values: (k,) complex, of the matrix solved.
        shift: what makes them eigenvalues of J.

    Returns:
        (q,) int, ascending indices into `values`, one of each conjugate pair: 3 with the largest and 3 with the
        smallest real part, 8 nearest Re = 0, and 3 nearest it on either side, of those that are not zero to rounding:
        many that are would hide a defective one that is not; at most 20 in all.
    """
    upper = np.flatnonzero(values.imag >= 0)
    real = values.real[upper] + shift
    order = np.argsort(real, kind="stable")
    nearest = np.argsort(np.abs(real), kind="stable")
    zero = len(values) * np.finfo(values.dtype).eps * np.abs(values + shift).max(initial=0.0)
    sides = [nearest[real[nearest] < -zero][:EACH_END], nearest[real[nearest] > zero][:EACH_END]]
    return np.unique(upper[np.concatenate([order[:EACH_END], order[-EACH_END:], nearest[:NEAREST], *sides])])


@dataclass(frozen=True)
class Moments:
    """What is known of a matrix M (k x k) before it is overwritten.

    Attributes:
        trace: of M.
        trace_square: of M M.
        frobenius: norm of M.
    """

    trace: float
    trace_square: float
    frobenius: float


@dataclass(frozen=True)
class Count:
    """How many eigenvalues are on the counted side of a line or circle.

    Attributes:
        threshold: the line Re = threshold, or the circle's radius.
        count: how many are strictly on that side; None where it is open.
        basis: what the answer rests on, in a few words; `open` where there is none.
        margin: every eigenvalue is at least that far from the boundary; 0 where one lies on it, as structural zeros do
            where it is 0, and where the count is open.
        computed: whether it rests on Lanczos steps from a random start as well (each bound fails with a probability of
            1e-12), or, at small orders, on singular values taken as backward stable; False for inertia alone.
        note: details, and why it is open.
        tolerated: every matrix within this distance, in the 2-norm, has the same count; 0 where it is open.
    """

    threshold: float
    count: int | None
    basis: str
    margin: float
    computed: bool
    note: str = ""
    tolerated: float = 0.0


@dataclass(frozen=True)
class Ends:
    """What stands in for the rest of a spectrum of which only the ends were computed.

    Attributes:
        left_of_zero: how many of the k eigenvalues have a negative real part.
        outside_disc: how many of them have |1 + l| > 1 (forward Euler's step 1 is not stable); of a branch only.
        radius: the largest modulus of the k, from two starts; nan where they did not converge.
        range_left: left end of the numerical range of the matrix solved, shifted as J is; of J itself it is a bound
            only for the eigenvalues.
        range_right: right end: the logarithmic norm of the matrix solved, shifted.
        note: how the ends were found.
        left_lines: counts of the k left of lines near to the left end, at most one between eigenvalues that were found
            and one beyond them all: what proves that none was missed. Empty where that is not proved.
        right_lines: the same at the right end, counts of those right of the lines.
        discs: around each of the eigenvalues that were known: radii, with one eigenvalue exactly so near, and margins,
            within which a matrix has one there, too; none where that is not proved.
    """

    left_of_zero: Count
    outside_disc: Count | None
    radius: float
    range_left: float
    range_right: float
    note: str
    left_lines: tuple[Count, ...] = ()
    right_lines: tuple[Count, ...] = ()
    discs: tuple[tuple[tuple[float, float], ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values, infinities as strings."""
        return spelled(asdict(self))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Ends":
        """The inverse of `to_json`."""
        return read_as(cls, unspelled(fields))

    def open_ends(self, unproved: tuple[str, ...]) -> list[tuple[str, str]]:
        """The ends that are not proved, and how far out the numerical range is there.

        Args:
            unproved: of the certificate; of a run of an older version, which tried no proof, there are no lines.
        """
        ends = (("smallest", self.left_lines, self.range_left), ("largest", self.right_lines, self.range_right))
        return [
            (name, f"the numerical range reaches {reach:.6g}")
            for name, lines, reach in ends
            if name in unproved or not lines
        ]

    @property
    def basis(self) -> str:
        """What the share of negative real parts rests on."""
        left = self.left_of_zero
        return left.basis if left.count is None else f"{left.basis}, margin {left.margin:.2g}"


def _from_pair(value: Any) -> Any:
    """A complex number from [re, im], as JSON has it."""
    pair = isinstance(value, list) and len(value) == 2
    numbers = pair and all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in value)
    return complex(*value) if numbers else value


@dataclass(frozen=True)
class Certified:
    """One eigenvalue that was checked on the original, unreduced function.

    Attributes:
        value: the eigenvalue of J as stored.
        residual: the smaller of `|J u - l u|` and `|v^T J - l v^T|`, u and v the unit eigenvectors lifted to the input
            space, by jvp and vjp of the original function. Either bounds the change of J that makes l exact.
        condition: `|u| |v| / |v^H u|`, v the left eigenvector: how far l moves per unit perturbation of J; or of the
            reduced matrix, where that is what gives the smaller error.
        error: of the eigenvalue, see `stiffcore.eigen.certificate`; inf where an estimate is not shown to be a bound.
        estimate: of the error, to first order; None where it is not needed.
        converged: whether inverse iteration found both eigenvectors.
    """

    value: Annotated[complex, BeforeValidator(_from_pair)]
    residual: float
    condition: float
    error: float
    converged: bool
    estimate: float | None = None


@dataclass(frozen=True)
class Certificate:
    """What was checked about a spectrum after it was computed.

    Attributes:
        certified: the eigenvalues that set S, and a few more.
        trace_error: |sum of eigenvalues - trace| of the matrix solved, relative to its Frobenius norm.
        square_error: |sum of squares - trace of the square|, relative to the squared Frobenius norm.
        reduction_check: largest relative difference of the reduction from J on random tangents.
        error: the largest error of the certified eigenvalues (absolute), of those with a finite one, and of the ends.
        s_error: error estimate of S; inf where min Re is within its error of zero.
        s_active_error: error estimate of S_active.
        near_axis: of how many computed eigenvalues the sign of the real part is not known: `negative` is open by that.
        axis_error: none of these has a larger |Re|; 0 where there are none. At orders that are not located as a whole
            (`stiffcore.eigen.inclusion`), the largest error among the certified ones that reaches the axis.
        failures: one line for each check that failed; empty where all passed.
        negative: how many of the k eigenvalues computed have a negative real part, at least and at most; None of other
            kinds, and of runs of an older version.
        outside: how many of them have |1 + l| > 1, at least and at most; None where not asked, or not known.
        unproved: of a spectrum that is not located as a whole, the ends (`smallest`, `largest`) that were found, but
            without a proof that nothing lies further out: `error` and the errors of S reach to the numerical range.
        near_first: of a whole spectrum that is not located, with signs that are open: how many eigenvalues are within
            `axis_error` of the axis, which is a count to first order; None elsewhere.
        real_parts: of a whole spectrum with an end that is not proved, the ends of the numerical range; None elsewhere.
    """

    certified: tuple[Certified, ...]
    trace_error: float
    square_error: float
    reduction_check: float
    error: float
    s_error: float
    s_active_error: float
    near_axis: int
    axis_error: float
    failures: tuple[str, ...]
    negative: tuple[int, int] | None = None
    outside: tuple[int, int] | None = None
    unproved: tuple[str, ...] = ()
    near_first: int | None = None
    real_parts: tuple[float, float] | None = None

    @property
    def estimated_error(self) -> float:
        """The largest error of the certified eigenvalues, to first order where no bound is known."""
        return max((c.error if c.estimate is None else c.estimate for c in self.certified), default=0.0)

    @property
    def first_order(self) -> int:
        """Of how many certified eigenvalues the error is known to first order only."""
        return sum(c.estimate is not None for c in self.certified)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def __repr__(self) -> str:
        """A line: whether all checks passed, of how many eigenvalues, and the errors."""
        said = "passed" if self.passed else f"FAILED: {'; '.join(self.failures)}"
        shown = (
            f"{len(self.certified)} eigenvalues checked, error {self.error:.2g}, of S active {self.s_active_error:.2g}"
        )
        return f"Certificate({said}; {shown})"

    def to_json(self) -> dict[str, Any]:
        """As JSON values; complex as [re, im], infinities as strings."""
        fields = asdict(self)
        fields["certified"] = [{**c, "value": [c["value"].real, c["value"].imag]} for c in map(asdict, self.certified)]
        return spelled(fields)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Certificate":
        """The inverse of `to_json`."""
        return read_as(cls, unspelled(fields))


@dataclass(frozen=True)
class Parts:
    """Where the eigenvalues of a block triangular Jacobian come from: its diagonal blocks, a token each in a sequence.

    Attributes:
        axis: of the input, whose positions the blocks are.
        position: (c,) int, the first position of each block, in the order of dependence.
        size: (c,) int, positions of each.
        ones: (c,) int, exact ones of each.
        zeros: (c,) int, exact zeros of each.
        error: (c,) the largest error estimate of each one's certified eigenvalues.
        source: (k,) int, the block of each computed eigenvalue.
    """

    axis: int
    position: np.ndarray
    size: np.ndarray
    ones: np.ndarray
    zeros: np.ndarray
    error: np.ndarray
    source: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class Spectrum:
    """The n eigenvalues of a Jacobian J (n x n): k of a smaller matrix, `ones` exactly 1, `zeros` exactly 0.

    Attributes:
        computed: (k,) complex, ascending by real part, then imaginary part; conjugate pairs are exact. Where `ends` is
            set: those with the largest and the smallest real parts only, a few at either end. Of `singular` real, not
            negative.
        ones: exact eigenvalues 1 (outputs that only the identity skip reaches).
        zeros: exact structural zeros (outputs that the outer activation holds at zero, or the rank of the waist).
        k: the order of the matrix that was solved.
        kind: `matrix`; `tensor-slices`, of which k eigenvalues are not zero, and all are of many matrices; `singular`:
            real singular values, of which k are neither exactly 0 nor 1.
        function: `block` or `branch`.
        name: of the block.
        solver: which solver computed it.
        reason: which matrix was solved, and why.
        certificate: what was checked.
        record: what is recorded of its unit (`stiffcore.record.UnitRecord`), where it comes from a run.
        ends: what is known of the others, where only the ends were computed.
        shift: what was added to the eigenvalues of the matrix M that was solved.
        frobenius: norm of M; nan where unknown.
        numerical_abscissa: of shift I + M; nan where unknown.
        given: the metrics, where the values alone do not say them: of tensor slices (which signs are unsure), and where
            the run keeps no values.
        has_values: whether `computed` has all that was computed; else it is empty.
        components: of a block triangular Jacobian, its diagonal blocks; None of others, and where no values are kept.
    """

    computed: np.ndarray
    ones: int
    zeros: int
    k: int
    kind: str
    function: str
    name: str
    solver: str
    reason: str
    certificate: Certificate
    record: Any = field(default=None, repr=False)
    ends: Ends | None = None
    shift: int = 0
    frobenius: float = float("nan")
    numerical_abscissa: float = float("nan")
    given: dict[str, float] | None = None
    has_values: bool = True
    components: "Parts | None" = None

    @property
    def n(self) -> int:
        """How many eigenvalues there are: the order of J, or those of all its slices."""
        return self.k + self.ones + self.zeros

    @cached_property
    def values(self) -> np.ndarray:
        """(n,): all eigenvalues, complex, ascending by real part, then imaginary part; of `singular`, real.

        Raises:
            InputError: where only the ends were computed, or the run keeps metrics only.
        """
        if not self.has_values:
            raise InputError(f"{self.name}: this run keeps metrics only; a new run with --keep spectra has the values")
        if self.ends is not None:
            raise InputError(f"{self.name}: only the ends of the spectrum were computed (see `computed` and `ends`)")
        exact = np.repeat(np.array([0, 1], dtype=self.computed.dtype), [self.zeros, self.ones])
        joined = np.concatenate([self.computed, exact])
        return joined[np.lexsort((joined.imag, joined.real))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """As `values`: for `np.asarray(spectrum)`.

        Raises:
            InputError: as `values`.
        """
        return np.array(self.values, dtype=dtype) if copy is not False else np.asarray(self.values, dtype=dtype)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """By name, as `stiffcore.metrics.spectrum_metrics` and `singular_metrics` say; nan: unknown or not of its kind.

        What the ends alone do not give is nan, too. `negative_low` and `negative_high`, `euler_stable_low` and
        `euler_stable_high` are the shares that are certain: equal where all are decided.
        """
        found = {**dict.fromkeys(NAMES, float("nan")), **self._metrics()}
        for name, counts in (("negative", self.negative_between), ("euler_stable", self.inside_between)):
            if counts is not None:
                found[f"{name}_low"], found[f"{name}_high"] = self._shares(counts)
        return found

    def component(self, c: int) -> np.ndarray:
        """All eigenvalues of one diagonal block, its exact ones and zeros among them.

        Args:
            c: which, as in `components`.

        Returns:
            Complex, ascending by real part, then imaginary part.

        Raises:
            InputError: where there are no components.
        """
        parts = self._parts()
        exact = np.repeat(np.array([0, 1], self.computed.dtype), [parts.zeros[c], parts.ones[c]])
        joined = np.concatenate([self.computed[parts.source == c], exact])
        return joined[np.lexsort((joined.imag, joined.real))]

    def component_metrics(self) -> dict[str, np.ndarray]:
        """The metrics of each diagonal block by itself, along the sequence.

        Returns:
            By name, as `metrics`, (c,) each; and `position`, the first position of each, and `error`.

        Raises:
            InputError: where there are no components.
        """
        parts = self._parts()
        order = np.argsort(parts.source, kind="stable")
        split = np.split(self.computed[order], np.searchsorted(parts.source[order], np.arange(1, len(parts))))
        branch = self.function == "branch"
        rows = [
            spectrum_metrics(values, int(ones), int(zeros), branch=branch)
            for values, ones, zeros in zip(split, parts.ones, parts.zeros, strict=True)
        ]
        names = rows[0].keys()
        found = {name: np.array([row[name] for row in rows]) for name in names}
        return {"position": parts.position, **found, "error": parts.error}

    def _parts(self) -> Parts:
        if self.components is None:
            raise InputError(f"{self.name}: its Jacobian was solved as a whole, or no values are kept: no components")
        return self.components

    def _shares(self, counts: tuple[int, int]) -> tuple[float, ...]:
        return tuple(count / self.n if self.n else float("nan") for count in counts)

    @property
    def negative_between(self) -> tuple[int, int] | None:
        """How many of the n eigenvalues have a negative real part, at least and at most; None of singular values."""
        if self.kind == Kind.SINGULAR:
            return None
        if self.certificate.negative is not None:
            return self.certificate.negative
        share = self._metrics().get("negative", float("nan"))
        if np.isnan(share):
            return (0, self.k) if self.n else None
        if self.ends is not None:
            return round(share * self.n), round(share * self.n)  # proved, or it would be nan
        found, near = round(share * self.n), self.certificate.near_axis
        return max(0, found - near), min(self.n, found + near)

    @property
    def inside_between(self) -> tuple[int, int] | None:
        """How many have |1 + l| <= 1, at least and at most; None where that has no meaning, or is not known."""
        outside = self.certificate.outside
        if self.kind != Kind.MATRIX or self.function != "branch" or outside is None:
            return None
        return self.k + self.zeros - outside[1], self.k + self.zeros - outside[0]

    def _metrics(self) -> dict[str, float]:
        if self.given is not None:
            return self.given
        if self.kind == Kind.SINGULAR:
            return singular_metrics(self.computed, self.ones, self.zeros)
        branch = self.function == "branch"
        if self.ends is None:
            return spectrum_metrics(
                self.computed,
                self.ones,
                self.zeros,
                branch=branch,
                shift=self.shift,
                frobenius=self.frobenius,
                numerical_abscissa=self.numerical_abscissa,
                axis_error=self.certificate.axis_error if self.certificate.near_axis else 0.0,
            )
        outside = self.ends.outside_disc
        return extreme_metrics(
            self.computed,
            self.k,
            self.ones,
            self.zeros,
            negative=self.ends.left_of_zero.count,
            outside=None if outside is None else outside.count,
            radius=self.ends.radius,
            branch=branch,
            numerical_abscissa=self.ends.range_right,
        )

    @property
    def basis(self) -> str:
        """What the metrics rest on: all eigenvalues, or the ends and a proof of how many are negative."""
        return "all eigenvalues" if self.ends is None else f"ends; {self.ends.basis}"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a certified spectrum still leaves open: signs and an S that are within their errors."""
        certificate, lines = self.certificate, []
        if self.kind == Kind.SINGULAR:
            within = f"{certificate.near_axis} singular values are within their error of 0"
            return (within,) if certificate.near_axis else ()
        if self.ends is not None and self.ends.left_of_zero.count is None:
            between = self.negative_between
            low, high = (f"{100 * share:.4g}" for share in self._shares(between or (0, self.k)))
            lines.append(f"how many have negative real part is open, {low} to {high} %: needs the spectrum")
        elif certificate.near_axis:
            without = ", and they are left out of the decay ratio" if self.metrics["decay_ratio"] > 0 else ""
            between = self.negative_between
            assert between is not None
            low, high = (f"{100 * share:.4g}" for share in self._shares(between))
            count = f"{certificate.near_axis:,} eigenvalue{'s' if certificate.near_axis > 1 else ''}"
            lines.append(f"the sign of {count} is open: {low} to {high} % are negative{without}")
            if certificate.near_first is not None:
                near, found = certificate.near_first, 100 * self.metrics["negative"]
                within = "none is" if not near else "1 is" if near == 1 else f"{near:,} are"
                computed = f"as computed {found:.4g} % are, and to first order {within} within an error of the axis"
                lines[-1] = f"{lines[-1]}; {computed}"
        for name, bounds in () if self.ends is None else self.ends.open_ends(certificate.unproved):
            lines.append(f"the {name} real part is found, not proved: {bounds}")
        for name in certificate.unproved if self.ends is None else ():
            reach = certificate.real_parts[name == "largest"] if certificate.real_parts else float("nan")
            bounds = f"the numerical range reaches {reach:.6g}" if np.isfinite(reach) else "no bound is known"
            lines.append(f"the {name} real part is found, not proved: {bounds}")
        if certificate.first_order and (certificate.unproved or certificate.near_axis):
            number, total = certificate.first_order, len(certificate.certified)
            lines.append(f"of {number} of {total} eigenvalues checked, the error is known to first order only")
        s = abs(self.metrics["S_active"])
        if not (certificate.s_active_error <= DOUBTFUL * s or np.isnan(s)):
            lines.append("S active is within its error")
        inside = self.inside_between
        if inside is not None and inside[0] < inside[1] and self.ends is None:
            low, high = (f"{100 * share:.4g}" for share in self._shares(inside))
            lines.append(f"which are stable under Euler's step 1 is open: {low} to {high} %")
        return tuple(lines)

    @property
    def verdict(self) -> str:
        """In words: certified, certified with its doubts, or not certified and why."""
        if not self.certificate.passed:
            return "NOT certified: " + "; ".join(self.certificate.failures)
        return "certified, but " + "; ".join(self.doubts) if self.doubts else "certified"

    def plot(self, axis: "Axes | None" = None) -> "Axes":
        """Draw the eigenvalues in the complex plane, both axes to the same scale; singular values by size.

        Args:
            axis: matplotlib axes to draw on; None: those of a new figure, `axis.figure`.

        Returns:
            The axes. What is what: see `stiffcore.report.figures.draw_spectrum`.

        Raises:
            InputError: where matplotlib is not installed.
        """
        return drawing("plot")(self, axis)

    def _repr_html_(self) -> str:
        m, c = self.metrics, self.certificate
        found = f"{len(self.computed) if self.has_values else self.k:,}"
        found += "" if self.ends is None else f" of {self.k:,}"
        lines = {
            "n": f"{self.n:,}: {found} computed, {self.ones:,} ones, {self.zeros:,} zeros",
            "S (Eq. 10)": spell(m["S"]),
            "S active": f"{spell(m['S_active'], 7)} ± {spell(c.s_active_error, 2)}",
            "Re < 0": spell_share(m, "negative") + " %",
            "Re = 0": "open" if np.isnan(m["zero"]) else f"{100 * m['zero']:.3f} %",
            "max Re": spell(m["abscissa"]),
            "min Re, active": spell(m["min_re_active"]),
            "rests on": self.basis,
            "verdict": self.verdict,
        }
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in lines.items())
        return f"<table><caption>{escape(f'{self.name}, {self.kind} of {self.function}')}</caption>{rows}</table>"

    def __repr__(self) -> str:
        m, c = self.metrics, self.certificate
        return (
            f"Spectrum({self.name}, {self.kind} of {self.function}, n={self.n}: {len(self.computed)} computed"
            f"{'' if self.ends is None else f' of {self.k}'}, {self.ones} ones, "
            f"{self.zeros} zeros; S={m['S']:.6g}, S_active={m['S_active']:.6g} +- {c.s_active_error:.1e}, "
            f"Re<0: {spell_share(m, 'negative')} %; {self.verdict})"
        )


def drawing(name: str) -> Callable[..., Any]:
    """A function of `report.figures`, which stands on this module: it is looked up when it is called.

    Raises:
        InputError: where matplotlib is not installed.
    """
    try:
        return getattr(import_module("stiffcore.report.figures"), name)
    except ImportError as error:
        raise InputError(f"{error}; pip install 'stiffcore[report]'") from error


def spelled(value: Any) -> Any:
    """A value for strict JSON, which has no infinities and no nan: these become strings."""
    if isinstance(value, dict):
        return {k: spelled(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [spelled(v) for v in value]
    return repr(float(value)) if isinstance(value, float) and not np.isfinite(value) else value


def unspelled(value: Any) -> Any:
    """The inverse of `spelled`."""
    if isinstance(value, dict):
        return {k: unspelled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [unspelled(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


# Half of a surrogate pair, which is no character.
_HALF = re.compile("[\ud800-\udfff]")


@cache
def _reader(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def read_as(kind: Any, values: Mapping[str, Any]) -> Any:
    """A value of that type from JSON values, which are what they should be, not only like it: no "5", no 5.0 for 5.

    Raises:
        ValueError: naming what is wrong.
    """
    try:
        # bytes of a file's name that are no UTF-8 may stand in a message, and are spelled out
        text = _HALF.sub(lambda half: f"\\\\u{ord(half[0]):04x}", json.dumps(values, ensure_ascii=False))
        return _reader(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(_problem(e) for e in error.errors(include_url=False)[:3])) from error


def _problem(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {'not there' if error['type'] == 'missing' else error['msg'].removeprefix('Value error, ')}"
