"""stiffcore: exact, certified eigenvalue spectra of Jacobians too large for one GPU or one machine's memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stiffcore.version import __version__

if TYPE_CHECKING:
    from stiffcore.api import analyze, spectrum
    from stiffcore.errors import BusyError, DamagedError, InputError, StiffcoreError
    from stiffcore.report.figures import plot_compare
    from stiffcore.report.statistics import compare
    from stiffcore.run import Run, open_run
    from stiffcore.spectra import Certificate, Certified, Count, Ends, Spectrum
    from stiffcore.study import Study

_HOMES = {
    "analyze": "api",
    "compare": "report.statistics",
    "plot_compare": "report.figures",
    "spectrum": "api",
    "BusyError": "errors",
    "DamagedError": "errors",
    "InputError": "errors",
    "StiffcoreError": "errors",
    "Run": "run",
    "open_run": "run",
    "Certificate": "spectra",
    "Certified": "spectra",
    "Count": "spectra",
    "Ends": "spectra",
    "Spectrum": "spectra",
    "Study": "study",
}

__all__ = [
    "BusyError",
    "Certificate",
    "Certified",
    "Count",
    "DamagedError",
    "Ends",
    "InputError",
    "Run",
    "Spectrum",
    "StiffcoreError",
    "Study",
    "__version__",
    "analyze",
    "compare",
    "open_run",
    "plot_compare",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    # a process that only coordinates must not pay for torch: 0.5 GB and two seconds
    if name in _HOMES:
        return getattr(import_module(f"stiffcore.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'stiffcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
