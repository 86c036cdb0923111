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

        run()
    except (ImportError, MemoryError, OSError, RuntimeError) as error:  # a command loads what it needs when it needs it
        limit = _limit()
        if isinstance(error, RuntimeError) and not limit:
            raise
        sys.exit(f"error: stiffcore cannot be loaded: {str(error) or type(error).__name__}{limit}")


def _limit() -> str:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"; this process may map {limit / 2**30:.2g} GiB (ulimit -v), and stiffcore needs about 8 GiB"


if __name__ == "__main__":
    main()
