"""A run read again, all of it: what is not as it was written, and on request, whether its spectra can be had again.

Nothing is mended here: what is found is recorded with its unit, and the next `stiffcore run` makes just that anew.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from stiffcore.errors import DamagedError, StiffcoreError
from stiffcore.record import ARRAYS, Stage, UnitRecord
from stiffcore.run import IMAGE_ARRAYS, Run
from stiffcore.spectra import certified_choice
from stiffcore.store import IMAGES, PIXELS, Part, RunStore, same_images, stored_spectrum
from stiffcore.study import Kind
from stiffcore.trust import check_code, trusted_network

# Of a unit, from the store, its record and a device.
Opener = Callable[[RunStore, UnitRecord, str], Any]
# An error estimate made again may be so many times the stored one, and so much more, relative to the Frobenius norm:
# other vectors of the same eigenvalues have other residuals.
AGREEMENT = 100.0
ROUNDING = 1e-9
# Beside an eigenvalue, for a factorisation that is not singular; relative to the norm.
OFFSET = 1e-9


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written.

    Attributes:
        unit: key; `images`, or empty for what makes the run.
        part: path of it in the run.
        problem: what is wrong.
    """

    unit: str
    part: str
    problem: str


@dataclass
class Verification:
    """What reading a run again has shown.

    Attributes:
        findings: one for each damaged part; empty where all is whole.
        unread: one for each part that cannot be read now, by permissions or a fault of the disk; it may be whole.
        parts: things read: arrays, each with its metadata, and records.
        read_bytes: of these.
        recomputed: certificates that were made again.
        unchecked: those that could not be, by unit, and why; this is no damage.
        recorded: whether findings were recorded with their units; not where the run may not be written to.
    """

    findings: list[Finding] = field(default_factory=list)
    unread: list[Finding] = field(default_factory=list)
    parts: int = 0
    read_bytes: int = 0
    recomputed: int = 0
    unchecked: dict[str, str] = field(default_factory=dict)
    recorded: bool = True

    @property
    def problems(self) -> int:
        """Parts that are damaged, or cannot be read."""
        return len(self.findings) + len(self.unread)


def verify(
    run: Run,
    *,
    certificates: bool = False,
    module: Any = None,
    trust: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Read everything in a run again: checksums, digests, records of what is done, fingerprints of the images.

    The run is held meanwhile, and what is found is recorded with its unit; where it may not be written to, it is only
    read.

    Args:
        run: any.
        certificates: make those of all certified spectra again, too: of a matrix's spectrum from the stored
            eigenvalues, those certified found again by inverse iteration on a matrix built anew; of another kind by
            computing the unit again. Memory: as the unit's plan says.
        module: the network, where the run was made with one in memory.
        trust: whether code that the run names (`package.module:factory`) may be imported, for the certificates.
        tell: told of units done and units in all.

    Raises:
        BusyError: where another process works on the run.
        UntrustedError: where code would be imported without `trust`.
    """
    trusted = trusted_network(run.study, trust=trust)
    if certificates:
        check_code(run.study, trusted, run.store.url)
    opener = partial(_open, module=module, trusted=trusted)
    found = Verification()
    try:
        with run.store.hold():
            _verify(run, found, certificates, opener, tell)
            return found
    except (OSError, DamagedError):
        found = Verification(recorded=False)
    _verify(run, found, certificates, opener, tell)
    return found


def _open(*args: Any, **options: Any) -> Any:
    from stiffcore.unit import open_operator

    return open_operator(*args, **options)


def _verify(
    run: Run, found: Verification, certificates: bool, opener: Opener, tell: Callable[[int, int], None]
) -> None:
    from stiffcore.solvers import stored_by

    store = run.store
    for path in ("", "units"):
        _add(found, "", Part(path or "zarr.json", *store.read_metadata(path)))
    _read_again(store, IMAGES, IMAGES, IMAGE_ARRAYS, found)
    if not found.problems:
        try:
            problem = "" if same_images(store, run.header.identity.images) else "not the images that the run began with"
        except DamagedError as error:
            problem = str(error)
        found.findings += [Finding(IMAGES, f"{IMAGES}/{PIXELS}", problem)] if problem else []
    records, damaged = store.whole_units(looking=True)
    keys = run.header.units
    for done, key in enumerate(keys):
        before = found.problems
        expected = stored_by(records[key]) if key in records else ()
        _read_again(store, f"units/{key}", key, expected, found)
        if key in damaged and found.problems == before:
            found.findings.append(Finding(key, f"units/{key}", damaged[key]))
        if found.problems == before and _has_spectrum(records[key]):
            _check_number(store, key, found)
        if certificates and found.problems == before and _has_spectrum(records[key]):
            try:
                problem = _recomputed(store, key, records[key], opener)
            except (StiffcoreError, RuntimeError) as error:
                found.unchecked[key] = str(error)
            else:
                found.recomputed += 1
                if problem:
                    found.findings.append(Finding(key, "certificate", problem))
        tell(done + 1, len(keys))
    if found.recorded:
        _record(store, found, records)


def _read_again(store: RunStore, group: str, unit: str, expected: Iterable[str], found: Verification) -> None:
    for part in store.read_again(group, expected):
        _add(found, unit, part)


def _add(found: Verification, unit: str, part: Part) -> None:
    found.parts += 1
    found.read_bytes += part.size
    if part.problem:
        (found.unread if part.unread else found.findings).append(Finding(unit, part.path, part.problem))


def _has_spectrum(record: UnitRecord) -> bool:
    from stiffcore.solvers import answers

    return record.stage is Stage.DONE and answers(record)


def _check_number(store: RunStore, key: str, found: Verification) -> None:
    """Whether so many eigenvalues are stored as the record says."""
    try:
        stored_spectrum(store, key)
    except DamagedError as error:
        found.findings.append(Finding(key, f"units/{key}/eigenvalues", str(error)))


def _recomputed(store: RunStore, key: str, record: UnitRecord, opener: Opener) -> str:
    """What the certificate of a unit, made again, says against the stored one; nothing where they agree."""
    if record.unit.kind is not Kind.MATRIX or not record.values_kept or record.unit.components:
        return _computed_again(store, key, opener)
    return _certified_again(store, key, record, opener)


def _computed_again(store: RunStore, key: str, opener: Opener) -> str:
    """Carry the unit out once more, elsewhere, and compare the metrics."""
    from stiffcore.unit import carry_out

    header, record = store.settled(), store.record(key)
    with tempfile.TemporaryDirectory(prefix="stiffcore-verify-") as folder:
        again = RunStore(folder, create=True)
        again.put_record(key, UnitRecord(record.plan, Stage.PLANNED))
        again.header = replace(header, units=(key,))
        carry_out(
            folder,
            key,
            threads=header.threads,
            emit=lambda event: None,
            opener=lambda _, planned, device: opener(store, planned, device),
        )
        before, now = stored_spectrum(store, key), stored_spectrum(again, key)
    if now.certificate.failures and not before.certificate.failures:
        return f"computed again, it is not certified: {now.certificate.failures[0]}"
    for name, value in now.metrics.items():
        if not np.isclose(before.metrics[name], value, rtol=1e-6, atol=1e-9, equal_nan=True):
            return f"computed again, {name} is {value:.9g}, not {before.metrics[name]:.9g}"
    return ""


def _certified_again(store: RunStore, key: str, record: UnitRecord, opener: Opener) -> str:
    """Certify the stored eigenvalues with eigenvectors found anew, on a matrix built anew."""
    from stiffcore.eigen.certificate import certify, certify_ends, sparse_moments
    from stiffcore.jacobian.reduction import Reduction
    from stiffcore.unit import division_checks, sparse_matrix

    reduction = opener(store, record, "cpu")
    assert isinstance(reduction, Reduction)
    if not reduction.k:
        return ""
    matrix = sparse_matrix(reduction, record.plan.chunk).astype(np.float64)
    spectrum = stored_spectrum(store, key)
    values = spectrum.computed.astype(complex) - reduction.shift
    moments = sparse_moments(matrix)
    if record.ends and record.converged:
        vectors, good = _vectors(matrix, values, moments.frobenius), record.converged
        found = certify_ends(
            reduction, values, vectors, moments, record.ends, right_end=good.right_end, left_end=good.left_end
        )
    else:
        chosen = certified_choice(values, reduction.shift)
        vectors = _vectors(matrix, values[chosen], moments.frobenius)
        found = certify(reduction, values, chosen, vectors, moments, **division_checks(record))
    if found.failures and not spectrum.certificate.failures:
        return f"made again, it fails: {found.failures[0]}"
    before, now = spectrum.certificate.error, found.error
    if not record.ends:  # what locates them, or proves the ends, is not done again
        before, now = spectrum.certificate.estimated_error, found.estimated_error
    if now > AGREEMENT * before + ROUNDING * moments.frobenius:
        return f"made again, its error of the eigenvalues is {now:.1e}, not {before:.1e}"
    return ""


def _vectors(matrix: Any, values: np.ndarray, norm: float) -> Any:
    """Both eigenvectors of each value, by Arnoldi with the inverse beside it."""
    from stiffcore.eigen.dense import Eigenvectors
    from stiffcore.eigen.extremes import nearest
    from stiffcore.eigen.sparse import Shifted

    k, rng = matrix.shape[0], np.random.default_rng(0)
    sides = np.full((2, k, len(values)), np.nan, complex)
    for i, value in enumerate(values):
        try:
            shifted = Shifted(matrix, value + OFFSET * norm)
        except ZeroDivisionError:
            continue
        for side, adjoint in enumerate((False, True)):
            found, vectors = nearest(shifted, 1, rng, adjoint=adjoint)
            if len(found):
                x = vectors[:, int(np.argmin(np.abs(found - (np.conj(value) if adjoint else value))))]
                sides[side, :, i] = x / np.linalg.norm(x)
    return Eigenvectors(sides[0], sides[1], np.asarray(np.isfinite(sides).all(axis=(0, 1))))


def _record(store: RunStore, found: Verification, records: dict[str, UnitRecord]) -> None:
    """Leave word with each damaged unit, so that `run` makes it anew without reading all again."""
    damaged: dict[str, list[str]] = {}
    for finding in found.findings:
        if finding.unit in records:
            names = damaged.setdefault(finding.unit, [])
            name = finding.part.removeprefix(f"units/{finding.unit}").strip("/")
            name = "eigenvalues" if name == "certificate" else name
            names += [name] if name.removesuffix("_tiles") in ARRAYS else []
    for key, names in damaged.items():  # where only white space of the record was damaged, this mends it
        store.update(key, damaged=tuple(sorted(set(names))))
