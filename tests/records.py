"""Headers and records of units for tests of the store, which holds nothing else."""

from stiffcore.record import Header, Stage, UnitPlan, UnitRecord
from stiffcore.study import Identity, Solver, Study, Unit, unit_key


def a_header(**changes):
    """The header of a run of one image."""
    made_of = dict.fromkeys(("network", "weights", "normalize", "pool", "dtype", "reduce"), "")
    identity = Identity(**made_of, images=("",), blocks=(), functions=(), kinds=())
    return Header(**{"version": "0", "study": Study(), "identity": identity} | changes)


def key_of(block):
    """The key of the unit of `a_record`."""
    return unit_key(0, block, "block", "matrix")


def a_record(block="u", **changes):
    """What is recorded of a unit of a block with nothing done, changed."""
    unit = Unit(
        key=key_of(block),
        image=0,
        label=0,
        number=1,
        block=block,
        function="block",
        kind="matrix",
        n=9,
        m=9,
        k=9,
        route="full",
        reason="",
        fingerprint="",
    )
    return UnitRecord(UnitPlan(unit, Solver.HOST_DENSE, ""), Stage.PLANNED).changed(**changes)


def put(store, block="u", **changes):
    """Store it; its key."""
    store.put_record(key_of(block), a_record(block, **changes))
    return key_of(block)


def said(event):
    """The kind of an event, or the stage that it is of."""
    return str(getattr(event, "stage", event.kind))
