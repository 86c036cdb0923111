"""Whatever a file holds or an option says, it is either taken or refused by one error of ours: never a traceback."""

import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from stiffcore.errors import StiffcoreError
from stiffcore.networks.checkpoint import read_checkpoint, refuse_nonfinite
from stiffcore.networks.images import load_images
from stiffcore.plan import make_plan
from stiffcore.run import open_run
from stiffcore.solvers.projection import Machine
from stiffcore.store import RunStore
from stiffcore.study import Study
from tests.records import a_header
from tests.test_checkpoints import Trap

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
STATE = {"layer.weight": torch.arange(12.0).view(3, 4), "layer.bias": torch.ones(3), "steps": torch.tensor(7)}


def taken(work, names=""):
    """What `work` returns; None where it refuses, in words that name the place."""
    try:
        return work()
    except StiffcoreError as error:
        said = str(error)
    assert said
    assert str(names) in said
    return None


def png():
    found = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(found, "PNG")
    return found.getvalue()


def npz():
    found = io.BytesIO()
    np.savez(found, x=np.zeros((2, 4, 4, 3), np.uint8), y=np.arange(2))
    return found.getvalue()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Good files, by suffix."""
    folder = tmp_path_factory.mktemp("good")
    save_file(STATE, folder / "a.safetensors")
    torch.save({"state_dict": STATE}, folder / "a.pt")
    torch.save(STATE, folder / "a.pth", _use_new_zipfile_serialization=False)
    (folder / "a.npz").write_bytes(npz())
    (folder / "a.png").write_bytes(png())
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@st.composite
def harm(draw):
    """What to do to the bytes of a file: a few edits, each at a share of its length."""
    edit = st.tuples(
        st.sampled_from(["flip", "cut", "zero", "insert", "repeat", "drop"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.integers(0, 255),
    )
    return draw(st.lists(edit, min_size=1, max_size=3))


def harmed(data, edits):
    for what, share, length, value in edits:
        at = int(share * len(data))
        head, part, tail = data[:at], data[at : at + length], data[at + length :]
        data = {
            "flip": head + bytes([part[0] ^ (value or 1)]) + part[1:] + tail if part else data,
            "cut": head,
            "zero": head + bytes(len(part)) + tail,
            "insert": head + bytes([value]) * length + part + tail,
            "repeat": head + part + part + tail,
            "drop": head + tail,
        }[what]
    return data


@QUICK
@given(kind=st.sampled_from([".safetensors", ".pt", ".pth"]), edits=harm())
def test_a_harmed_checkpoint_is_read_or_refused(tmp_path, originals, kind, edits):
    path = tmp_path / f"a{kind}"
    path.write_bytes(harmed(originals[kind], edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = taken(lambda: read_checkpoint(path), path)
    if state is None:
        return
    taken(lambda: refuse_nonfinite(state, str(path)), path)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@QUICK
@given(edits=harm(), zipped=st.booleans())
def test_no_harm_makes_a_pickle_run(tmp_path, edits, zipped):
    mark, path = tmp_path / "ran", tmp_path / "a.pt"
    if zipped:
        torch.save({"w": torch.ones(1), "x": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"w": Trap(mark)}))
    path.write_bytes(harmed(path.read_bytes(), edits))
    taken(lambda: read_checkpoint(path), path)
    assert not mark.exists()


@QUICK
@given(kind=st.sampled_from([".npz", ".png"]), edits=harm())
def test_harmed_images_are_read_or_refused(tmp_path, originals, kind, edits):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"a{kind}"
    path.write_bytes(harmed(originals[kind], edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = taken(lambda: load_images(str(path if kind == ".npz" else folder.parent), count=1), tmp_path)
    assert found is None or len(found) == 1


ANYTHING = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=12),
    st.text("0123456789,.-GiMBKe ", max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=3),
    st.sampled_from(["matrix", "branch", "block,branch", "all", "1,2", "auto", "cuda", "float32", "spectra", "none"]),
)


@QUICK
@given(options=st.dictionaries(st.sampled_from([*Study.model_fields, "no_such"]), ANYTHING, max_size=5))
def test_any_options_are_a_study_or_refused(options):
    study = taken(lambda: Study.ask(options))
    if study is None:
        return
    assert Study(**json.loads(json.dumps(study.model_dump(mode="json")))) == study


@QUICK
@given(text=st.text("0123456789.eE+-_ GiMBKTinfa", max_size=10))
def test_any_budget_is_a_number_of_bytes_or_refused(text):
    found = taken(lambda: Study.ask({"memory": text}))
    assert found is None or found.memory > 0


@QUICK
@given(
    memory=st.integers(1, 1 << 40),
    cores=st.integers(1, 64),
    reserved=st.integers(0, 1 << 36),
    workers=st.integers(0, 99),
)
def test_any_machine_has_a_plan_within_its_budget(memory, cores, reserved, workers):
    study = Study.ask({"memory": memory})
    machine = Machine(cores, reserved, 1 << 28, None, 1e10)
    plan = make_plan([], study, machine, workers=workers or None)
    assert plan.workers >= 1
    assert plan.seconds == 0


@pytest.fixture
def header(tmp_path):
    store = RunStore(str(tmp_path / "run"), create=True)
    store.header = a_header()
    return Path(tmp_path / "run")


@QUICK
@given(edits=harm(), which=st.sampled_from(["zarr.json", "units/zarr.json", "both"]))
def test_a_harmed_header_is_refused_and_the_other_one_read(header, edits, which):
    names = ["zarr.json", "units/zarr.json"] if which == "both" else [which]
    good = {name: (header / name).read_bytes() for name in names}
    try:
        for name in names:
            (header / name).write_bytes(harmed(good[name], edits))
        found = taken(lambda: open_run(str(header)), header)
        assert found is None or found.header.version == "0"
        RunStore.restore(str(header))
        if which != "both":
            assert open_run(str(header)).header.version == "0"
    finally:
        for name, data in good.items():
            (header / name).write_bytes(data)


@pytest.mark.parametrize("field", [b"zarr_format", b"node_type"])
def test_a_header_without_a_field_of_zarrs_own_is_restored_from_its_copy(header, field):
    good = (header / "zarr.json").read_bytes()
    (header / "zarr.json").write_bytes(good.replace(field, field[::-1]))
    assert RunStore.restore(str(header))
    assert (header / "zarr.json").read_bytes() == good
