"""Claims about what was asked: every offender is named at once, and a study means the same from anywhere."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stiffcore.errors import InputError
from stiffcore.study import (
    IN_MEMORY,
    BlockFunction,
    Kind,
    Normalize,
    Study,
    fingerprint,
    format_bytes,
    parse_bytes,
    unit_key,
    versions,
)


def test_defaults_are_a_study():
    study = Study.ask({})
    assert study.functions == (BlockFunction.BLOCK,)
    assert study.kinds == (Kind.MATRIX,)
    assert study.memory is None
    assert Study(**study.model_dump(mode="json")) == study


def test_none_means_not_given():
    assert Study.ask({"network": None, "dtype": None}) == Study()


def test_every_wrong_option_is_named_at_once():
    wrong = {
        "dtype": "float16",
        "memory": "lots",
        "count": 0,
        "functions": ["trunk"],
        "kinds": "matrix,matrix",
        "device": "tpu",
        "index": "1,x",
        "keep": "nothing",
        "pool": "mean",
        "normalize": "mnist",
        "download": "perhaps",
        "weights": 5,
        "no_such_option": 1,
    }
    with pytest.raises(InputError) as caught:
        Study.ask(wrong)
    message = str(caught.value)
    names = {
        "functions": "function",
        "kinds": "kind",
        "no_such_option": "no-such-option",
    }
    for name in wrong:
        assert f"--{names.get(name, name)}: " in message, name
    for value in ("'float16'", "lots", "0", "'trunk'", "'matrix,matrix'", "'tpu'", "'x'", "'mean'", "'mnist'"):
        assert value in message
    assert "float64" in message
    assert len(message.splitlines()) == 1 + len(wrong)


@pytest.mark.parametrize("value", ["-4GiB", "0", "0GiB", "", "GiB", "4 apples", "nan", "1e400", "inf", "4GiB 2"])
def test_nonsense_is_no_memory(value):
    with pytest.raises(InputError, match="memory"):
        Study.ask({"memory": value})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500 * 10**6),
        ("500MiB", 500 << 20),
        ("1073741824", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2 GiB", 2 << 30),
        ("4gib", 4 << 30),
        ("64B", 64),
    ],
)
def test_sizes_are_parsed(text, count):
    assert parse_bytes(text) == count
    assert Study.ask({"memory": text}).memory == count


@pytest.mark.parametrize("text", ["", "GiB", "lots", "4 apples", "-1GiB", "nan"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(InputError, match="is not a size: write 4GiB"):
        parse_bytes(text)


@given(st.integers(0, 1 << 50))
def test_format_bytes_is_near_the_number(count):
    number, unit = format_bytes(count).split()
    scale = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    assert abs(float(number) * scale - count) <= 0.51 * scale


def test_a_study_is_frozen():
    study = Study()
    with pytest.raises(ValidationError):
        study.network = "resnet18"
    assert hash(study) == hash(Study())


@pytest.mark.parametrize(
    "given_",
    [{"count": 2, "index": "0"}, {"count": 1, "per_label": 1}, {"index": [1], "per_label": 2, "count": 3}],
)
def test_one_way_to_choose_images(given_):
    with pytest.raises(InputError, match="give one of --") as caught:
        Study.ask(given_)
    for name in given_:
        assert "--" + name.replace("_", "-") in str(caught.value)


@pytest.mark.parametrize("before", [{"count": 2}, {"index": "3,1"}, {"per_label": 1}, {}])
@pytest.mark.parametrize("after", [{"count": 5}, {"index": [0, 2]}, {"per_label": 4}])
def test_one_way_to_choose_images_replaces_another(before, after):
    changed = Study.ask(before).with_options({**after, "weights": None})
    chosen = changed.model_dump(include={"count", "index", "per_label"}, exclude_none=True)
    assert chosen == {k: tuple(v) if isinstance(v, list) else v for k, v in after.items()}


def test_with_options_keeps_the_rest_and_validates():
    study = Study.ask({"network": "resnet18", "index": "1,2", "memory": "2GiB", "normalize": "imagenet"})
    changed = study.with_options({"memory": "3GiB", "index": None})
    assert changed == study.model_copy(update={"memory": 3 << 30})
    assert changed.normalize is Normalize.IMAGENET
    assert study.memory == 2 << 30
    with pytest.raises(InputError, match="--dtype"):
        study.with_options({"dtype": "int8"})


def test_lists_are_given_as_text_or_as_lists():
    a = Study.ask({"index": " 3, 1,", "functions": "branch,block"})
    assert a == Study.ask({"index": [3, 1], "functions": ["branch", "block"]})
    assert a.index == (3, 1)
    for empty in ({"index": ""}, {"index": []}, {"functions": ","}, {"kinds": ()}):
        with pytest.raises(InputError, match="at least one"):
            Study.ask(empty)
    with pytest.raises(InputError, match="twice"):
        Study.ask({"index": "1,1"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"network": IN_MEMORY, "weights": "w.pt"}, "a module in memory"),
        ({"network": IN_MEMORY, "pool": "max"}, "a module in memory"),
        ({"images": IN_MEMORY, "count": 1}, "--count: for images from a source"),
        ({"images": "samples", "data_root": "data"}, "for --images cifar10"),
        ({"images": "samples", "download": True}, "for --images cifar10"),
        ({"kinds": "tensor-slices", "solver": "extremes"}, "for --kind matrix"),
        ({"kinds": "singular", "reduce": "none"}, "for --kind matrix"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        Study.ask({"network": "resnet18"} | options)


def test_paths_mean_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study.ask({"weights": "w.pt", "images": "folder/x.npz"})
    source = Study.ask({"images": "cifar10", "data_root": Path("data")})
    monkeypatch.chdir("/")
    assert study.weights == str(tmp_path / "w.pt")
    assert study.images == str(tmp_path / "folder/x.npz")
    assert source.data_root == str(tmp_path / "data")
    assert study.with_options({"count": 1}).weights == study.weights
    assert Study.ask({"weights": "~/w.pt"}).weights == os.path.expanduser("~/w.pt")
    assert Study.ask({"images": tmp_path}).images == str(tmp_path)
    assert Study.ask({"weights": "random"}).weights == "random"
    for known in ("samples", "cifar10", IN_MEMORY):
        assert Study.ask({"images": known}).images == known


ODD = ["a/b", "a_b", "a.b", "a-b", "a b", "a\\b", "../b", "", ".", "..", "ä", "ö", "a", "A/b", "a__b", "lambda <x>"]


def test_keys_of_odd_blocks_are_safe_and_differ():
    keys = [unit_key(0, block, "block", "matrix") for block in [*ODD, "x" * 400, "x" * 401, "a_b-0", "a.b-block"]]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", key)
        assert key not in (".", "..")
        assert not key.startswith("__")


def test_the_key_of_a_module_path_is_plain():
    assert unit_key(3, "layer1.0", "branch", "matrix") == "000003-layer1.0-branch-matrix"


ARGS = st.tuples(
    st.integers(0, 3), st.text("ab/-_.", max_size=4), st.sampled_from(list(BlockFunction)), st.just(Kind.MATRIX)
)


@given(ARGS, ARGS)
def test_different_units_have_different_keys(a, b):
    assert (unit_key(*a) == unit_key(*b)) == (a == b)


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.integers())), max_size=6))
def test_a_fingerprint_does_not_depend_on_order(parts):
    backwards = dict(reversed(parts.items()))
    assert fingerprint(parts) == fingerprint(backwards)
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(parts))
    assert fingerprint({**parts, "new": 1}) != fingerprint({**parts, "new": 2})
    assert fingerprint({"x": parts}) == fingerprint({"x": backwards})


def test_a_fingerprint_takes_enumerations_as_their_text():
    assert fingerprint({"f": BlockFunction.BLOCK}) == fingerprint({"f": "block"})


def test_versions_name_what_changes_digits():
    assert versions().keys() == {"stiffcore", "torch", "numpy", "scipy"}
