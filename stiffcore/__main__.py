"""The way in, of the script `stiffcore` and of `python -m stiffcore`: signals first, as loading takes a second."""

import sys

from stiffcore import ending


def main() -> None:
    """Load the command line and run it."""
    ending.handle()
    if sys.stdout is None:
        sys.exit("error: standard output is closed: give it a place, as >/dev/null")
    try:
        from stiffcore.cli import main as run
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        sys.exit(f"error: stiffcore cannot be loaded: {error or type(error).__name__}{_limit()}")
    run()


def _limit() -> str:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"; this process may map {limit / 2**30:.2g} GiB (ulimit -v), and stiffcore needs about 8 GiB"


if __name__ == "__main__":
    main()
