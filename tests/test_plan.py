"""Claims about the budget arithmetic: a plan that is made fits, and a refusal names what is enough."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stiffcore import memory
from stiffcore.commands import progress
from stiffcore.eigen.dense import LAPACK_MAX_ORDER
from stiffcore.errors import InputError
from stiffcore.plan import UNIT_SECONDS, Plan, check_budget, check_disk, make_plan, plan_below
from stiffcore.record import Ended, Failed, UnitPlan
from stiffcore.solvers.projection import Machine
from stiffcore.study import BlockFunction, Keep, Kind, Precision, Solver, Study, Unit

MIB, GIB = 1 << 20, 1 << 30


def unit(k, *, items=1000, network=0, block="layer1.0", route="waist", column_s=1e-4, n=None, image=0):
    n = 2 * k if n is None else n
    return Unit(
        key=f"{image:06d}-{block}",
        image=image,
        label=0,
        number=1,
        block=block,
        function=BlockFunction.BLOCK,
        kind=Kind.MATRIX,
        n=n,
        m=n,
        k=k,
        zeros=n - k,
        route=route,
        reason="because",
        column_items=items,
        column_s=column_s,
        network_bytes=network,
        fingerprint="",
    )


def machine(**changes):
    return replace(Machine(4, 400 * MIB, 150 * MIB, None, 5e10), **changes)


def planned(units, memory, m=None, workers=None, **options):
    return make_plan(units, Study(memory=memory, **options), m or machine(), workers=workers)


def test_below_the_last_rung_nothing_is_left():
    plan = planned([unit(300)], 4 * GIB).units[0]
    assert plan.solver is Solver.HOST_DENSE
    below = plan_below(plan, Study(memory=4 * GIB), machine(), 4 * GIB, "out of memory")
    assert below.solver is Solver.DIVIDE
    assert below.why.startswith("host-dense: out of memory; blocks of")
    below = plan_below(below, Study(memory=4 * GIB), machine(), 4 * GIB, "out of memory")
    assert below.refused
    assert below.why == "divide: out of memory; no rung is left"


def test_what_no_memory_holds_is_divided():
    (p,) = planned([unit(5000)], 650 * MIB).units
    assert p.solver is Solver.DIVIDE
    assert re.search(r"host-dense of layer1.0 needs .*: use --memory \d+MiB; blocks of", p.why)
    assert p.projected_bytes <= 250 * MIB
    assert p.disk_bytes >= 7 * 8 * 5000**2


UNITS = st.builds(
    unit,
    st.one_of(st.integers(0, 300), st.integers(0, LAPACK_MAX_ORDER + 1000)),
    items=st.integers(1, 50_000_000),
    network=st.integers(0, GIB),
    block=st.sampled_from(["a", "b", "c.0"]),
    column_s=st.floats(0, 1),
)
MACHINES = st.builds(
    Machine,
    st.integers(1, 64),
    st.integers(0, GIB),
    st.integers(0, GIB),
    st.one_of(st.none(), st.integers(0, 100 * GIB)),
    st.floats(1e8, 1e12),
)
BUDGETS = st.one_of(st.integers(1, 4 * GIB), st.integers(1, 200 * GIB))
DTYPES = st.sampled_from(list(Precision))
MANY = settings(max_examples=200, deadline=None)


@MANY
@given(
    st.lists(UNITS, min_size=1, max_size=6),
    BUDGETS,
    MACHINES,
    DTYPES,
    st.sampled_from(list(Keep)),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_whatever_is_planned_fits(units, budget, m, dtype, keep, workers):
    plan = planned(units, budget, m, workers, dtype=dtype, keep=keep)
    assert plan.data_bytes == budget - m.reserved_bytes - (plan.workers - 1) * m.worker_bytes
    spread = max(p.spread for p in plan.units)  # a unit that is divided has work for all that were asked for
    assert spread <= max(1, workers or 1)
    assert 1 <= plan.workers <= max(spread, min(len(units), workers or m.cores))
    assert plan.threads * plan.workers <= max(m.cores, plan.workers)
    assert sorted(p.unit.key for p in plan.units) == sorted(u.key for u in units)
    busy = [p for p in plan.units if p.works]
    assert [p.seconds for p in busy] == sorted(p.seconds for p in busy)
    for p in plan.units:
        assert p.works != p.refused
        integers = [v for f in fields(p) if isinstance(v := getattr(p, f.name), (int, float)) and f.name != "seconds"]
        assert all(type(v) in (int, bool) for v in [*integers, *p.stages.values(), p.projected_bytes])
        assert all(v >= 0 for v in integers)
        assert 1 <= p.chunk <= max(1, p.unit.k)
        assert p.shard >= 1
        assert p.shard % p.chunk == 0 or p.shard >= p.unit.k
        assert p.kept_bytes <= p.disk_bytes <= plan.disk_bytes
        if p.works:
            assert p.projected_bytes <= plan.data_bytes
            assert p.device_bytes <= (m.device_bytes or 0)
    assert all(type(v) is int for v in (plan.disk_bytes, plan.workers, plan.threads, plan.data_bytes))
    assert plan.seconds >= max((p.seconds for p in busy), default=0)


def named(why, m=None):
    """The least --memory that the message names, as the user would give it; None where it names none.

    With a device, the most: for more memory the plan takes larger chunks, which the device may not hold.
    """
    found = [Study.ask({"memory": text}).memory for text in re.findall(r"--memory (\S+?)(?:;|$)", why)]
    return (max if m and m.device_bytes is not None else min)(found, default=None)


@MANY
@given(UNITS, BUDGETS, MACHINES, DTYPES)
def test_what_a_refusal_names_is_enough(u, budget, m, dtype):
    (p,) = planned([u], budget, m, dtype=dtype).units
    if not p.refused:
        return
    if u.k > LAPACK_MAX_ORDER:
        assert "over 32-bit LAPACK" in p.why
        return
    enough = named(p.why, m)
    assert enough > budget
    assert planned([u], enough, m, dtype=dtype).refused == []


@MANY
@given(st.lists(UNITS, min_size=1, max_size=4), BUDGETS, BUDGETS, MACHINES, DTYPES)
def test_a_larger_budget_refuses_nothing_that_a_smaller_accepts(units, a, b, m, dtype):
    small, large = (planned(units, budget, m, dtype=dtype) for budget in sorted((a, b)))
    assert {p.unit.key for p in large.refused} <= {p.unit.key for p in small.refused}


@MANY
@given(st.lists(UNITS, min_size=1, max_size=4), BUDGETS, MACHINES)
def test_the_budget_that_check_budget_names_is_enough_for_all(units, budget, m):
    units = [u.model_copy(update={"key": str(i)}) for i, u in enumerate(units) if u.k <= LAPACK_MAX_ORDER]
    plan = planned(units, budget, m)
    if not plan.refused:
        check_budget(plan)
        return
    with pytest.raises(InputError) as caught:
        check_budget(plan)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the budget is too small:"
    assert lines[-1].endswith("--solver extremes")
    named_lines = lines[1:-1]
    assert len(named_lines) == len({p.unit.block for p in plan.refused})
    check_budget(planned(units, max(named(line, m) for line in named_lines), m))


@MANY
@given(st.integers(0, LAPACK_MAX_ORDER - 1), st.integers(1, 1000), st.integers(1, 1 << 20), DTYPES)
def test_a_larger_matrix_is_not_projected_smaller(k, more, items, dtype):
    def projected(order):
        (p,) = planned([unit(order, items=items, n=200_000)], 10_000 * GIB, dtype=dtype).units
        return p.stages["hessenberg"], p.stages["eigenvectors"], p.flops

    larger = min(k + more, LAPACK_MAX_ORDER)
    assert all(a <= b for a, b in zip(projected(k), projected(larger), strict=True))


def test_projection_is_never_below_the_matrix_twice():
    (p,) = planned([unit(5000)], 4 * GIB).units
    assert p.projected_bytes >= 2 * 5000 * 5000 * 8
    (half,) = planned([unit(5000)], 4 * GIB, dtype="float32").units
    assert half.projected_bytes < 0.6 * p.projected_bytes


def test_a_tight_budget_is_met_by_smaller_shards():
    m = machine(device_bytes=80 * GIB)
    loose = planned([unit(2000)], GIB, m).units[0]
    assert "prove" in loose.stages
    needed = max(held for stage, held in loose.stages.items() if stage != "prove")  # which is done where it fits
    tight = planned([unit(2000)], 400 * MIB + needed - 3 * MIB, m).units[0]
    assert loose.works
    assert tight.works
    assert tight.solver is loose.solver is Solver.CUDA_DENSE
    assert tight.shard < loose.shard


def test_no_order_is_a_plan_too():
    plan = planned([unit(0, n=10)], GIB)
    (p,) = plan.units
    assert p.works
    assert (p.chunk, p.flops, p.disk_bytes) == (1, 0, 0)
    assert p.seconds == 0


def test_no_unit_is_a_plan_too():
    plan = planned([], GIB)
    assert (plan.units, plan.workers, plan.disk_bytes, plan.seconds) == ((), 1, 0, 0)


def test_a_unit_without_spectrum_is_neither_work_nor_refused():
    (p,) = planned([unit(0, n=10, route="none")], 1).units
    assert not p.works
    assert not p.refused
    assert p.why == "because"
    assert p.projected_bytes == 0
    assert UnitPlan.from_json(p.unit, json.loads(json.dumps(p.to_json()))) == p


def test_an_order_that_lapack_cannot_count_is_divided_whatever_the_memory():
    units = [unit(LAPACK_MAX_ORDER + 1), unit(LAPACK_MAX_ORDER, block="b")]
    plans = {p.unit.block: p for p in planned(units, 1 << 60).units}
    assert plans["b"].solver is Solver.HOST_DENSE
    assert plans["layer1.0"].solver is Solver.DIVIDE
    assert "46,341 is over 32-bit LAPACK's 46,340" in plans["layer1.0"].why
    plan = planned(units, 1 << 60, solver="host-dense")
    (p,) = plan.refused
    assert "46,341" in p.why
    assert "46,340" in p.why
    assert "--memory" not in p.why
    assert not p.works
    with pytest.raises(InputError, match="46,341") as caught:
        check_budget(plan)
    assert "budget" not in str(caught.value)


class TestDevice:
    def test_is_chosen_where_it_fits(self):
        (p,) = planned([unit(2000)], 4 * GIB, machine(device_bytes=8 * GIB)).units
        assert p.solver is Solver.CUDA_DENSE
        assert 5 * 2000 * 2000 * 8 < p.device_bytes <= 8 * GIB
        assert p.stages.keys() == {"open", "build", "solve", "prove"}
        assert UnitPlan.from_json(p.unit, json.loads(json.dumps(p.to_json()))) == p

    def test_is_passed_over_where_it_does_not_fit(self):
        (p,) = planned([unit(2000)], 4 * GIB, machine(device_bytes=100 * MIB)).units
        assert p.solver is Solver.HOST_DENSE
        assert re.search(r"cuda-dense: needs .* of the device, 100 MiB may be used; fits the host budget", p.why)

    def test_is_passed_over_where_cusolver_cannot_count(self):
        (p,) = planned([unit(46_341)], 1000 * GIB, machine(device_bytes=1000 * GIB)).units
        assert p.solver is Solver.DIVIDE
        assert "over cuSOLVER's 46,340" in p.why
        assert "over 32-bit LAPACK's 46,340" in p.why

    def test_is_no_way_round_the_host_budget(self):
        m = machine(device_bytes=80 * GIB)
        (p,) = planned([unit(10_000)], 900 * MIB, m).units
        assert p.solver is Solver.DIVIDE
        assert "cuda-dense of layer1.0 needs" in p.why
        # the device needs less of the host than the host's own solver
        (p,) = planned([unit(10_000)], 1300 * MIB, m).units
        assert p.solver is Solver.CUDA_DENSE
        assert p.projected_bytes <= 900 * MIB


class TestDivisionOnADevice:
    def test_blocks_are_there_and_panels_on_the_host(self):
        m = machine(device_bytes=2 * GIB)
        (p,) = planned([unit(20_000)], 1500 * MIB, m).units
        assert p.solver is Solver.DIVIDE
        assert p.why.endswith("on the device")
        assert p.device_bytes <= 2 * GIB
        assert p.device_bytes > 8 * p.panel * p.at_once * 20_000
        (host,) = planned([unit(20_000)], 1500 * MIB).units
        assert p.stages["divide"] < host.stages["divide"]
        assert p.at_once * p.panel > host.at_once * host.panel or p.stages["divide"] < host.stages["divide"] / 2
        assert UnitPlan.from_json(p.unit, json.loads(json.dumps(p.to_json()))) == p

    def test_where_the_device_is_full_the_host_goes_on(self):
        m = machine(device_bytes=2 * GIB)
        (p,) = planned([unit(20_000)], 1500 * MIB, m).units
        below = plan_below(p, Study(memory=1500 * MIB), m, 1100 * MIB, "out of memory")
        assert (below.solver, below.device_bytes) == (Solver.DIVIDE, 0)

    def test_a_device_that_holds_no_block_is_not_used(self):
        (p,) = planned([unit(20_000)], 1500 * MIB, machine(device_bytes=20 * MIB)).units
        assert (p.solver, p.device_bytes) == (Solver.DIVIDE, 0)

    def test_as_many_share_a_unit_as_have_a_device(self):
        m = machine(separate=4, gpus=2, device_bytes=2 * GIB)
        (p,) = planned([unit(20_000)], 1500 * MIB, m, solver="divide").units
        assert p.spread == 2


class TestSpread:
    def test_a_unit_is_shared_by_the_workers_asked_for_within_one_budget(self):
        (alone,) = planned([unit(5000)], 900 * MIB, solver="divide").units
        plan = planned([unit(5000)], 900 * MIB, workers=2, solver="divide")
        (p,) = plan.units
        assert (alone.spread, p.spread, plan.workers) == (1, 2, 2)
        assert p.at_once < alone.at_once
        assert p.projected_bytes <= plan.data_bytes == 900 * MIB - 400 * MIB - 150 * MIB
        assert p.stages["divide"] > 2 * 8 * p.panel * p.at_once * 5000
        assert p.seconds < alone.seconds
        assert plan.holds(p, [])
        assert not plan.holds(p, [replace(p, spread=1, stages={})])
        assert not plan.holds(replace(p, spread=1, stages={}), [p])

    def test_by_fewer_where_they_have_no_room(self):
        plan = planned([unit(5000)], 580 * MIB, workers=3, solver="divide")
        (p,) = plan.units
        assert (p.spread, plan.workers) == (1, 1)
        assert p.projected_bytes <= plan.data_bytes

    def test_by_fewer_where_another_unit_needs_their_memory(self):
        units = [unit(5000, block="a", image=1), unit(5600, block="b")]
        (b, a) = sorted(planned(units, 830 * MIB, workers=2).units, key=lambda p: p.unit.block, reverse=True)
        assert (a.solver, b.solver) == (Solver.HOST_DENSE, Solver.DIVIDE)
        assert b.spread == 1

    def test_by_all_workers_of_a_cluster_each_with_a_budget_of_its_own(self):
        (alone,) = planned([unit(5000)], 900 * MIB, solver="divide").units
        plan = planned([unit(5000)], 900 * MIB, machine(separate=4), solver="divide")
        (p,) = plan.units
        assert (p.spread, plan.workers) == (4, 4)
        assert p.at_once == alone.at_once
        assert p.projected_bytes <= plan.data_bytes == 500 * MIB


class TestWorkers:
    def test_are_as_many_as_cores_units_and_memory_allow(self):
        units = [unit(1000, block=str(i)) for i in range(6)]
        for cores, expected in ((1, 1), (4, 4), (16, 6)):
            plan = planned(units, 8 * GIB, machine(cores=cores))
            assert (plan.workers, plan.threads) == (expected, max(1, cores // expected))
        largest = planned(units, 8 * GIB).units[-1].projected_bytes
        for extra in range(4):
            plan = planned(units, 400 * MIB + extra * 150 * MIB + largest, machine())
            assert plan.workers == extra + 1
            assert plan.data_bytes >= largest

    def test_asked_for_are_a_limit(self):
        units = [unit(1000, block=str(i)) for i in range(6)]
        assert planned(units, 8 * GIB, workers=2).workers == 2
        assert planned(units, 8 * GIB, workers=50).workers == 6
        assert planned(units, 560 * MIB, workers=50).workers == 1


def test_cheap_units_come_first():
    plan = planned([unit(2000, block="b"), unit(100, block="a"), unit(0, route="none", n=4)], 8 * GIB)
    assert [p.unit.k for p in plan.units] == [0, 100, 2000]


def test_disk_holds_what_is_kept_and_the_scratch_of_those_at_work():
    units = [unit(1000, block=str(i)) for i in range(3)]
    spectra = planned(units, 8 * GIB, machine(cores=2))
    everything = planned(units, 8 * GIB, machine(cores=2), keep="all")
    matrices = 2 * 1000 * 1000 * 8
    assert 2 * matrices < spectra.disk_bytes < 2.2 * matrices
    assert 3 * matrices < everything.disk_bytes < 3.3 * matrices


def test_check_disk_says_what_is_needed_and_free():
    plan = planned([unit(1000)], 8 * GIB)
    check_disk(plan, None)
    check_disk(plan, plan.disk_bytes)
    with pytest.raises(InputError, match=r"needs up to 16 MiB of disk while it works, 3 MiB is free there"):
        check_disk(plan, 3 * MIB)


def test_check_budget_speaks_for_a_block_by_its_largest_unit():
    plan = planned([unit(4000, image=0), unit(3000, image=1), unit(2000, block="b")], 410 * MIB)
    with pytest.raises(InputError) as caught:
        check_budget(plan)
    message = str(caught.value)
    assert message.count("host-dense of layer1.0 ") == message.count("divide of layer1.0 ") == 1
    assert message.count("host-dense of b ") == message.count("divide of b ") == 1
    assert "reserved 400 MiB" in message
    assert "budget 410 MiB" in message
    check_budget(planned([unit(4000), unit(3000, image=1)], named(message.splitlines()[-2])))


@MANY
@given(UNITS, BUDGETS, MACHINES)
def test_a_unit_plan_survives_json(u, budget, m):
    (p,) = planned([u], budget, m).units
    assert UnitPlan.from_json(u, json.loads(json.dumps(p.to_json(), allow_nan=False))) == p


def test_without_a_budget_the_plan_takes_the_default(monkeypatch):
    monkeypatch.setattr("stiffcore.plan.default_allowed_bytes", lambda: 123 * MIB)
    assert planned([unit(10)], None).allowed_bytes == 123 * MIB


class TestCgroup:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(memory, "PROC_CGROUP", tmp_path / "proc")
        free = type("Memory", (), {"available": 10 * GIB})
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
        (tmp_path / "cgroup").mkdir()
        self.proc = tmp_path / "proc"
        return tmp_path / "cgroup"

    def write(self, folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")

    def test_without_one_the_machine_counts(self, root):
        assert memory.default_allowed_bytes() == 8 * GIB

    def test_version_2(self, root):
        self.write(root, memory__max=5 * GIB, memory__current=3 * GIB)
        assert memory.default_allowed_bytes() == int(0.8 * 2 * GIB)
        self.write(root, memory__max=50 * GIB)
        assert memory.default_allowed_bytes() == 8 * GIB
        self.write(root, memory__max="max")
        assert memory.default_allowed_bytes() == 8 * GIB

    def test_version_1(self, root):
        folder = root / "memory"
        self.write(folder, memory__limit_in_bytes=5 * GIB, memory__usage_in_bytes=3 * GIB)
        assert memory.default_allowed_bytes() == int(0.8 * 2 * GIB)
        self.write(folder, memory__limit_in_bytes=9223372036854771712)
        assert memory.default_allowed_bytes() == 8 * GIB

    def test_cached_files_are_no_memory_in_use(self, root):
        self.write(root, memory__max=5 * GIB, memory__current=5 * GIB)
        assert memory.default_allowed_bytes() == 0
        self.write(root, memory__stat=f"anon {GIB}\ninactive_file {3 * GIB}")
        assert memory.default_allowed_bytes() == int(0.8 * 3 * GIB)

    def test_the_tightest_of_nested_groups_counts(self, root):
        self.proc.write_text("1:name=systemd:/x\n0::/user.slice/job.scope\n")
        self.write(root / "user.slice", memory__max=6 * GIB, memory__current=5 * GIB)
        self.write(root / "user.slice/job.scope", memory__max=4 * GIB, memory__current=2 * GIB)
        assert memory.default_allowed_bytes() == int(0.8 * GIB)
        self.write(root / "user.slice", memory__max="max")
        assert memory.default_allowed_bytes() == int(0.8 * 2 * GIB)

    def test_a_version_1_container_sees_its_own_group_at_the_root(self, root):
        self.proc.write_text("5:cpu,cpuacct:/docker/ab\n9:memory:/docker/ab\n")
        self.write(root / "memory", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=GIB)
        assert memory.default_allowed_bytes() == int(0.8 * 2 * GIB)

    def test_nonsense_is_no_limit(self, root):
        self.proc.write_text("nonsense\n")
        self.write(root, memory__max="lots", memory__current=1)
        assert memory.default_allowed_bytes() == 8 * GIB


METER = """
import time, numpy as np
from stiffcore import memory

with memory.PeakMeter() as meter:
    start = meter.peak_bytes
    block = np.ones(60 << 20, "u1")
    until = time.monotonic() + 60
    while meter.peak_bytes - start < 50 << 20 and time.monotonic() < until:
        time.sleep(memory.SAMPLE_S)
    del block
assert meter.peak_bytes - start > 50 << 20, (start, meter.peak_bytes)
assert memory.own_bytes() <= memory.tree_bytes() + (5 << 20)
"""


def test_the_peak_meter_sees_what_is_allocated():
    # in a process of its own: this one's other tests start and end children
    subprocess.run([sys.executable, "-c", METER], check=True)


def test_a_plan_states_all_its_fields():
    assert {f.name for f in fields(Plan)} >= {
        "allowed_bytes",
        "reserved_bytes",
        "worker_bytes",
        "workers",
        "disk_bytes",
    }


def test_the_estimate_counts_what_a_unit_takes_beside_its_arithmetic():
    plan = planned([unit(20, image=i) for i in range(50)], 4 * GIB)
    assert plan.seconds >= 50 * UNIT_SECONDS / plan.workers


def test_what_is_left_follows_the_units_that_ended(monkeypatch):
    plan, clock = planned([unit(20, image=i) for i in range(4)], 4 * GIB), [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.Bars, "_report", lambda self, event: None)
    bars = progress.Bars()
    bars.begin("run", plan)
    clock[0] += 60  # a minute for a unit that was to take seconds
    bars.event(Ended(plan.units[0].unit.key))
    assert [task.fields["note"] for task in bars.bars.tasks] == ["4 units, about 3.0 min left"]
    bars.event(Failed(plan.units[1].unit.key, "out of memory"))  # at once, which says nothing of the others
    assert [task.fields["note"] for task in bars.bars.tasks] == ["4 units, about 2.0 min left"]
