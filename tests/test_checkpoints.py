"""Checkpoints and networks: what is read, what is refused and how it says so, and which network comes out."""

import argparse
import copy
import os
import pickle
import threading
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from stiffcore.errors import InputError
from stiffcore.networks.checkpoint import (
    NESTS,
    WRAPPERS,
    aligned,
    common_prefix,
    fit_state,
    read_checkpoint,
    weights_digest,
)
from stiffcore.networks.images import load_images, network_input
from stiffcore.networks.zoo import RESNETS, bundled_weights, load_network, wrap_network

STATE = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "bn.num_batches_tracked": torch.tensor(7),
    "fc.bias": torch.tensor([1.0, -2.0], dtype=torch.float16),
}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_containers_give_back_every_tensor(tmp_path, suffix, zipped):
    path = saved(tmp_path / f"a{suffix}", STATE, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path), STATE)


def test_safetensors_gives_back_every_tensor(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    assert same(read_checkpoint(tmp_path / "a.safetensors"), STATE)


@pytest.mark.parametrize("key", ["state_dict", "net", "model", "model_state_dict"])
def test_a_nested_state_is_found_and_what_lies_beside_it_ignored(tmp_path, key):
    path = saved(tmp_path / "a.pt", {key: STATE, "epoch": 3, "acc": 91.5, "optimizer": {"lr": [0.1]}})
    assert same(read_checkpoint(path), STATE)


def test_a_twice_nested_state_is_found(tmp_path):
    path = saved(tmp_path / "a.pt", {"state_dict": {"model": STATE, "step": 1}, "epoch": 3})
    assert same(read_checkpoint(path), STATE)


def test_a_name_beside_the_state_is_not_taken_for_it(tmp_path):
    path = saved(tmp_path / "a.pt", {"net": STATE, "model": "resnet18"})
    assert same(read_checkpoint(path), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.net."])
def test_a_prefix_of_all_keys_is_stripped(tmp_path, prefix):
    path = saved(tmp_path / "a.pt", {"net": {prefix + k: v for k, v in STATE.items()}})
    assert same(read_checkpoint(path), STATE)


def test_a_prefix_of_some_keys_is_kept(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert same(read_checkpoint(saved(tmp_path / "a.pt", state)), state)


def test_a_prefix_never_eats_a_whole_key():
    assert common_prefix(["model.a", "model.net.b"]) == "model."
    assert common_prefix(["net.", "net.a"]) == ""
    assert common_prefix([]) == ""


def test_saved_parameters_come_back_without_a_graph(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": nn.Parameter(torch.ones(2))})
    assert not read_checkpoint(path)["w"].requires_grad


# --------------------------------------------------------------------------------------------- refusals


class Trap:
    """Touches a file when an ordinary unpickler meets it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_named_and_never_run(tmp_path, zipped):
    mark = tmp_path / "ran"
    path = saved(tmp_path / "a.pt", {"w": torch.ones(1), "x": Trap(mark)}, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert "could run code" in message
    assert "system" in message
    assert str(path) in message
    assert not mark.exists()
    # the trap is a real one
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_malicious_plain_pickle_is_never_run(tmp_path):
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"w": Trap(mark)}))
    assert "could run code" in refused(path)
    assert not mark.exists()


def test_a_pickled_module_is_refused_by_the_name_of_its_class(tmp_path):
    assert "torch.nn.modules.linear.Linear" in refused(saved(tmp_path / "a.pt", nn.Linear(1, 1)))


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_says_so(tmp_path, kind, keep):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    state = {"w": torch.ones(50, 50)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        saved(path, state, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    message = refused(path)
    assert "cut short" in message
    assert "bytes" in message


def test_text_under_a_checkpoint_name_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("hello world, this is text")
    assert str(path) in refused(path)


@pytest.mark.parametrize("name", ["a.th", "a.pth.tar", "a.t7", "a.pkl", "a", "a.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_of_a_file_and_not_its_name_decides(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        saved(path, STATE, _use_new_zipfile_serialization=kind == "zip")
    assert same(read_checkpoint(path), STATE)


def test_a_compressed_archive_gives_its_tensors(tmp_path):
    state = {"zeros": torch.zeros(5000), "random": torch.randn(5000)}
    with (
        zipfile.ZipFile(saved(tmp_path / "a.pt", state)) as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in source.infolist():
            packed.writestr(member.filename, source.read(member))
    assert same(read_checkpoint(tmp_path / "b.pt"), state)
    with pytest.raises(InputError, match="unpacks to"):
        read_checkpoint(tmp_path / "b.pt", allowed=30_000)


# as trainers store it, to draw the same numbers again
LEGACY_RANDOM = np.random.RandomState(0).get_state()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        *(np.float64(0.93), np.float32(1), np.int64(3), np.bool_(True), np.ones(3), np.dtype("f4"), LEGACY_RANDOM),
        *(argparse.Namespace(lr=0.1, acc=np.float32(2)), [np.float64(1)], {"best": np.float64(1)}),
        *(Path("/data"), datetime(2026, 12, 1, tzinfo=UTC).date(), datetime(2026, 12, 1), torch.__version__),
    ],
)
def test_numbers_of_numpy_beside_the_state_are_ignored(tmp_path, beside, zipped):
    path = saved(tmp_path / "a.pt", {"state_dict": STATE, "best": beside}, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path), STATE)


def test_what_never_ends_is_no_checkpoint(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for at in (path, Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"):
            read_checkpoint(at)


def test_nothing_of_numpy_is_made_while_a_checkpoint_is_read(tmp_path):
    # a dtype whose state claims that bytes are objects would have numpy follow any address
    class Forged:
        def __reduce__(self):
            return np.core.multiarray.scalar if hasattr(np, "core") else np._core.multiarray.scalar, (
                np.dtype([("a", "O")]),
                b"A" * 8,
            )

    path = saved(tmp_path / "a.pt", {"state_dict": STATE, "x": Forged()})
    assert same(read_checkpoint(path), STATE)
    message = refused(saved(tmp_path / "b.pt", {"w": np.ones(3), "v": torch.ones(1)}))
    assert "'w'" in message


@pytest.mark.parametrize("key", [*NESTS, "weights_of_mine"])
def test_a_state_is_found_by_what_it_holds(tmp_path, key):
    beside = {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}
    assert same(read_checkpoint(saved(tmp_path / "a.pt", {**beside, key: STATE})), STATE)


def test_the_plain_state_is_taken_before_its_average_and_two_unknown_ones_are_refused(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    for key in ("state_dict", "model", "net"):
        assert same(read_checkpoint(saved(tmp_path / "a.pt", {"model_ema": other, key: STATE})), STATE)
    assert "'teacher' (a dict)" in refused(saved(tmp_path / "a.pt", {"teacher": STATE, "student": other}))


class Amount:
    def __init__(self, bytes_: int):
        self.bytes = bytes_

    def __reduce__(self):
        return bytearray, (self.bytes,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_is_refused_before_it_has_any(tmp_path, zipped):
    path = saved(tmp_path / "a.pt", {"w": torch.ones(1), "x": Amount(10)}, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert b"bytearray" in whole
    assert "it refers to bytearray" in refused(path)


def test_shapes_that_the_file_does_not_hold_are_refused_by_their_size(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.ones(1).expand(10**13)})
    assert path.stat().st_size < 10_000
    message = refused(path)
    assert "declares tensors of" in message
    many = {str(i): torch.ones(1000) for i in range(50)}
    one = torch.ones(1000)
    shared = saved(tmp_path / "b.pt", dict.fromkeys(many, one))
    with pytest.raises(InputError, match="declares"):
        read_checkpoint(shared, allowed=100_000)
    assert len(read_checkpoint(saved(tmp_path / "c.pt", many), allowed=0)) == 50


def test_a_safetensors_header_of_another_length_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for size in (1 << 40, 10**8, 5000):
        path.write_bytes(size.to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}')
        assert "damaged" in refused(path)
    header = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(36))
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"<!DOCTYPE html><html></html>", "page of the web"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, content, what):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert what in refused(tmp_path / name)


def test_tensors_without_values_and_programs_are_refused(tmp_path):
    assert "'w' (a Tensor)" in refused(saved(tmp_path / "a.pt", {"w": torch.ones(3, device="meta")}))
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "b.pt")
    assert "TorchScript" in refused(tmp_path / "b.pt")


def test_a_missing_file_a_folder_and_an_unknown_suffix_are_told_apart(tmp_path):
    assert "there is no checkpoint" in refused(tmp_path / "a.pt")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"x")
    assert ".safetensors" in refused(tmp_path / "a.onnx")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}])
def test_an_empty_dictionary_is_refused(tmp_path, content):
    assert "empty" in refused(saved(tmp_path / "a.pt", content))


def test_an_empty_safetensors_is_refused(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    assert "empty" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], 5])
def test_content_that_is_no_dictionary_is_named(tmp_path, content):
    assert "not a dictionary of tensors" in refused(saved(tmp_path / "a.pt", content))


def test_a_dictionary_that_contains_itself_is_refused(tmp_path):
    loop: dict = {}
    loop["model"] = loop
    assert "not a dictionary of tensors" in refused(saved(tmp_path / "a.pt", loop))


def test_non_tensors_are_all_named(tmp_path):
    message = refused(saved(tmp_path / "a.pt", {"w": torch.ones(1), "lr": 0.1, "name": "x", 3: torch.ones(1)}))
    assert "'lr' (a float)" in message
    assert "'name' (a str)" in message
    assert "3 (a Tensor)" in message


def test_sparse_tensors_are_refused(tmp_path):
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for weights in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), ragged):
        assert "dense" in refused(saved(tmp_path / "a.pt", {"w": weights}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_first_tensor_and_count(tmp_path, bad):
    state = {"ok": torch.ones(4), "first": torch.tensor([1.0, bad, bad]), "second": torch.tensor([bad])}
    message = refused(saved(tmp_path / "a.pt", state))
    assert "first has 2 of 3" in message
    assert "1 other" in message


# ----------------------------------------------------------------------------------------------- digest


def test_the_digest_ignores_key_order_and_container(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    paths = [
        tmp_path / "a.safetensors",
        saved(tmp_path / "a.pt", {"net": {f"module.{k}": v for k, v in STATE.items()}}),
        saved(tmp_path / "b.pt", STATE, _use_new_zipfile_serialization=False),
    ]
    digests = {weights_digest(read_checkpoint(path)) for path in paths}
    assert digests == {weights_digest(dict(reversed(STATE.items())))}


def test_the_digest_ignores_the_memory_layout():
    tensor = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert weights_digest({"w": tensor}) == weights_digest({"w": tensor.to(memory_format=torch.channels_last)})
    assert weights_digest({"w": tensor}) == weights_digest({"w": nn.Parameter(tensor)})


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(6)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"w": torch.zeros(2, 3, dtype=torch.float64)},
        {"w": -torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3), "x": torch.zeros(0)},
    ],
)
def test_the_digest_sees_name_shape_dtype_and_bits(other):
    assert weights_digest(other) != weights_digest({"w": torch.zeros(2, 3)})


def test_the_digest_takes_bfloat16_scalars_and_empty_tensors():
    state = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor(1.0), "c": torch.zeros(0, 2)}
    assert len(weights_digest(state)) == 64


# -------------------------------------------------------------------------------------------------- fit


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def misfit(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(InputError) as caught:
        fit_state(module, state, dtype, "a.pt")
    return str(caught.value)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fitted_module_computes_what_its_source_does(device, dtype):
    source = small().eval().requires_grad_(False)
    source[1].running_mean.fill_(0.5)
    with torch.device(device):
        module = small()
    fit_state(module, source.state_dict(), dtype, "a.pt")
    x = torch.randn(1, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.eval()(x), source.to(dtype)(x))
    assert not any(p.requires_grad for p in module.parameters())
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module[1].num_batches_tracked.dtype == torch.int64


def test_a_fitted_module_shares_no_memory_with_the_state():
    state = small().state_dict()
    module = small()
    fit_state(module, state, torch.float32, "a.pt")
    assert not {t.data_ptr() for t in state.values()} & {t.data_ptr() for t in module.state_dict().values()}


def test_a_missing_batch_counter_becomes_zero():
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    with torch.device("meta"):
        module = small()
    fit_state(module, state, torch.float32, "a.pt")
    assert module[1].num_batches_tracked.item() == 0


def test_a_mismatch_names_the_first_key_both_shapes_and_counts_the_others():
    state = small().state_dict()
    state["0.bias"] = torch.zeros(5)
    state["2.weight"] = torch.zeros(2, 4, 3, 3)
    del state["1.weight"]
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    message = misfit(small(), state)
    assert "a.pt does not fit" in message
    assert "first 0.bias: the network needs (4,), found (5,)" in message
    assert "7 other keys" in message
    assert "missing: 1.weight" in message
    assert "unexpected: extra0, extra1, extra2 and 2 more" in message


def test_integers_for_weights_are_a_mismatch():
    state = small().state_dict() | {"0.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int32)}
    assert "0.weight: the network needs float32 (4, 3, 3, 3), found int32" in misfit(small(), state)


def test_a_misfit_leaves_the_module_as_it_was():
    module = small()
    before = copy.deepcopy(module.state_dict())
    misfit(module, small().state_dict() | {"2.bias": torch.zeros(9)})
    assert same(before, module.state_dict())


def test_values_that_overflow_in_the_dtype_are_refused():
    state = small().state_dict() | {"2.bias": torch.tensor([1e30, 0.0])}
    assert "float16: 2.bias has 1 of 2" in misfit(small(), state, torch.float16)


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_a_meta_buffer_that_no_state_can_fill_is_refused():
    with torch.device("meta"):
        module = WithBuffer()
    assert "scale" in misfit(module, WithBuffer().state_dict())
    fit_state(WithBuffer(), WithBuffer().state_dict(), torch.float64, "a.pt")


@pytest.mark.parametrize("prefix", ["", *WRAPPERS, "_module.module.", "model.backbone.", "module.resnet."])
@pytest.mark.parametrize("own", ["", "backbone.", "net."])
def test_wrappers_of_either_side_do_not_count(prefix, own):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    found = aligned(state, [own + name for name in STATE])
    assert same(found, {own + name: tensor for name, tensor in STATE.items()})


def test_what_a_profiler_left_behind_is_passed_over(tmp_path):
    source = small()
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    profiled = {
        f"module.{name}{key}": torch.zeros(1) for name in ("", "0.", "1.") for key in ("total_ops", "total_params")
    }
    path = saved(tmp_path / "a.pt", state | profiled)
    module = small()
    fit_state(module, aligned(read_checkpoint(path), module.state_dict()), torch.float32, str(path))
    assert same(dict(module.state_dict()), dict(source.state_dict()))


# ---------------------------------------------------------------------------------------------- resnets


def cifar_resnet(network: str, classes: int = 10, kernel: int = 3) -> nn.Module:
    module = getattr(torchvision.models, network)(weights=None, num_classes=classes)
    if kernel == 3:
        module.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(1)
    return cifar_resnet("resnet18", classes=7)


def kuangliu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("fc.", "linear.").replace(".downsample.", ".shortcut."): v for k, v in state.items()}


def pixels() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_a_3x3_stem_and_the_classes_come_from_the_shapes(tmp_path, resnet18):
    path = saved(tmp_path / "a.pt", resnet18.state_dict())
    network = load_network("resnet18", path, torch.float32)
    assert torch.equal(network.module(pixels()), resnet18(pixels()))
    assert network.normalize == "cifar10"
    assert network.name == "resnet18"
    assert network.weights == str(path)
    assert network.weights_digest == weights_digest(resnet18.state_dict())
    assert network.description == "resnet18: 3x3 stem, max-pool, 7 classes, 11,172,423 parameters"
    assert not network.module.training
    assert not any(t.is_meta or t.requires_grad for t in network.module.state_dict(keep_vars=True).values())


def test_a_7x7_stem_is_torchvisions_own(tmp_path):
    module = cifar_resnet("resnet18", classes=5, kernel=7)
    network = load_network("resnet18", saved(tmp_path / "a.pt", module.state_dict()), torch.float32)
    assert torch.equal(network.module(pixels()), module(pixels()))
    assert network.normalize == "imagenet"
    assert "7x7 stem" in network.description


def test_pytorch_cifar_names_are_renamed_and_have_no_pool(tmp_path, resnet18):
    state = {f"module.{k}": v for k, v in kuangliu(resnet18.state_dict()).items()}
    network = load_network("resnet18", saved(tmp_path / "a.pth", {"net": state, "acc": 95.0}), torch.float32)
    bare = copy.deepcopy(resnet18)
    bare.maxpool = nn.Identity()
    assert isinstance(network.module.maxpool, nn.Identity)
    assert torch.equal(network.module(pixels()), bare(pixels()))
    assert "no max-pool" in network.description


def test_the_same_weights_under_other_names_have_another_digest(tmp_path, resnet18):
    # they stand for different networks: one has a max-pool, the other none
    paths = [
        saved(tmp_path / "a.pt", resnet18.state_dict()),
        saved(tmp_path / "b.pt", kuangliu(resnet18.state_dict())),
    ]
    assert len({load_network("resnet18", path, torch.float32).weights_digest for path in paths}) == 2


@pytest.mark.parametrize("pool", ["max", "none"])
@pytest.mark.parametrize("rename", [dict, kuangliu])
def test_pool_is_forced_whatever_the_names(tmp_path, resnet18, pool, rename):
    path = saved(tmp_path / "a.pt", rename(resnet18.state_dict()))
    module = load_network("resnet18", path, torch.float32, pool).module
    assert isinstance(module.maxpool, nn.MaxPool2d) == (pool == "max")


def test_another_depth_names_the_first_key_and_what_it_looks_like(tmp_path, resnet18):
    path = saved(tmp_path / "a.pt", resnet18.state_dict())
    with pytest.raises(InputError) as caught:
        load_network("resnet50", path, torch.float32)
    message = str(caught.value)
    assert "first layer1.0.conv1.weight: the network needs (64, 64, 1, 1), found (64, 64, 3, 3)" in message
    assert "looks like a resnet18" in message
    with pytest.raises(InputError, match=r"first layer1\.2\.conv1\.weight: the network needs \(64, 64, 3, 3\)"):
        load_network("resnet34", path, torch.float32)


def test_depths_stiffcore_does_not_know_are_still_recognised(tmp_path):
    with torch.device("meta"):
        shapes = torchvision.models.resnet101().state_dict()
    # one stored number, expanded: the file stays small
    state = {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in shapes.items()}
    with pytest.raises(InputError, match="looks like a resnet101, which stiffcore does not know"):
        load_network("resnet50", saved(tmp_path / "a.pt", state), torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 5, 5)}, r"conv1.weight has shape \(64, 3, 5, 5\)"),
        ({"fc.weight": torch.zeros(512)}, r"fc.weight has shape \(512,\)"),
        ({"linear.weight": torch.zeros(7, 512)}, "mixes the names"),
    ],
)
def test_a_stem_or_head_of_another_kind_is_named(tmp_path, resnet18, change, said):
    path = saved(tmp_path / "a.pt", resnet18.state_dict() | change)
    with pytest.raises(InputError, match=said):
        load_network("resnet18", path, torch.float32)


def test_a_checkpoint_of_something_else_is_no_resnet(tmp_path):
    path = saved(tmp_path / "a.pt", nn.Linear(2, 2).state_dict())
    with pytest.raises(InputError, match=r"no conv1.weight and no fc.weight \(its first keys: weight, bias"):
        load_network("resnet18", path, torch.float32)


def test_random_weights_are_the_same_each_time_and_leave_the_callers_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = load_network("resnet18", Path("random"), torch.float32)
    assert torch.equal(torch.rand(3), expected)
    b = load_network("resnet18", Path("random"), torch.float64, pool="none")
    assert a.weights == "random"
    assert a.weights_digest == b.weights_digest
    assert a.normalize == "cifar10"
    assert b.module.fc.weight.dtype == torch.float64
    assert isinstance(b.module.maxpool, nn.Identity)
    assert torch.equal(a.module.conv1.weight.double(), b.module.conv1.weight)
    assert not any(p.requires_grad for p in a.module.parameters())


def test_bundled_checkpoints_are_found_and_resnet34_asks_for_one():
    assert bundled_weights("resnet18").name == "resnet18_cifar10.safetensors"
    assert bundled_weights("resnet50").is_file()
    assert bundled_weights("resnet34") is None
    assert bundled_weights("../resnet18") is None
    with pytest.raises(InputError, match="--weights"):
        load_network("resnet34", None, torch.float32)


def test_the_bundled_resnet50_loads():
    network = load_network("resnet50", None, torch.float32)
    assert network.description.startswith("resnet50: 3x3 stem, max-pool, 10 classes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bundled_resnet18_knows_most_of_the_twenty_samples(dtype):
    network = load_network("resnet18", None, dtype)
    images = load_images("samples", count=20)
    with torch.no_grad():
        batch = torch.cat([network_input(image, network.normalize, dtype) for image in images.x])
        right = (network.module(batch).argmax(1).numpy() == images.y).sum()
    assert right >= 15


@pytest.mark.parametrize("prefix", ["module.", "_module.", "backbone.", "resnet.", "encoder."])
def test_a_resnet_s_checkpoint_is_read_under_any_wrapper(tmp_path, resnet18, prefix):
    state = {prefix + name: tensor for name, tensor in resnet18.state_dict().items()}
    path = saved(tmp_path / "a.pth.tar", {"state_dict": state, "best_acc": np.float64(0.9)})
    assert torch.equal(load_network("resnet18", path, torch.float32).module(pixels()), resnet18(pixels()))


def option_a(state: dict[str, Tensor], blocks: int, x: Tensor) -> Tensor:
    """The logits of a ResNet for CIFAR-10, written with operations on its state alone."""

    def norm(name: str, y: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(name: str, y: Tensor, stride: int = 1) -> Tensor:
        return nn.functional.conv2d(y, state[f"{name}.weight"], stride=stride, padding=1)

    x = norm("bn1", conv("conv1", x)).relu()
    for stage in (1, 2, 3):
        for i in range(blocks):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = norm(
                f"{name}.bn2", conv(f"{name}.conv2", norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)).relu())
            )
            if stride == 2:
                none = torch.zeros_like(out[:, : x.shape[1] // 2])
                x = torch.cat([none, x[:, :, ::2, ::2], none], dim=1)
            x = (out + x).relu()
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def test_a_resnet20_with_shortcuts_without_weights_is_the_function_of_its_checkpoint(tmp_path):
    made = load_network("resnet20", Path("random"), torch.float64)
    assert (made.weights, made.normalize) == ("random", "imagenet")
    generator = torch.Generator().manual_seed(4)
    state = {
        name: torch.rand(tensor.shape, generator=generator) + 0.5 if "bn" in name else tensor.float()
        for name, tensor in made.module.state_dict().items()
        if "num_batches" not in name
    }
    path = saved(
        tmp_path / "resnet20.th",
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "best_prec1": 91.0},
        _use_new_zipfile_serialization=False,
    )
    network = load_network("resnet20", path, torch.float64)
    x = pixels().double()
    expected = option_a({name: tensor.double() for name, tensor in state.items()}, 3, x)
    assert torch.allclose(network.module(x), expected, rtol=1e-10)
    assert network.weights_digest == weights_digest(state)
    assert network.description.startswith("resnet20: three stages, shortcuts without weights, 10 classes, 269,722")


def test_a_cifar_resnet_needs_a_checkpoint_of_its_depth_and_has_no_pool(tmp_path):
    with pytest.raises(InputError, match="resnet56: give one with --weights"):
        load_network("resnet56", None, torch.float32)
    with pytest.raises(InputError, match="has no max-pool"):
        load_network("resnet56", Path("random"), torch.float32, pool="max")
    path = saved(tmp_path / "a.th", load_network("resnet20", Path("random"), torch.float32).module.state_dict())
    with pytest.raises(InputError, match=r"first layer1\.3\.conv1\.weight: the network needs \(16, 16, 3, 3\)"):
        load_network("resnet32", path, torch.float32)


def test_an_unknown_name_pool_and_dtype_are_reported_together():
    with pytest.raises(InputError) as caught:
        load_network("vgg16", None, torch.int32, pool="avg")
    for part in ("vgg16", *RESNETS, "package.module:factory", "'avg'", "int32"):
        assert part in str(caught.value)


# -------------------------------------------------------------------------------------------- factories

FACTORIES = """
import torch
from torch import nn

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)

def broken():
    raise ValueError("no GPU today")

def nothing():
    return 3

constant = 4
"""


@pytest.fixture
def factories(tmp_path, monkeypatch) -> str:
    """The name of a module in the current folder; `sys.path` and `sys.modules` are put back after."""
    import sys

    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield name
    sys.modules.pop(name, None)


def test_a_factory_in_the_current_folder_is_called(factories):
    a = load_network(f"{factories}:Wrapped", None, torch.float64)
    b = load_network(f"{factories}:Wrapped", None, torch.float64)
    assert a.module.scale.dtype == torch.float64
    assert a.module.model.weight.dtype == torch.float64
    assert (a.normalize, a.weights, a.name) == ("none", "in memory", f"{factories}:Wrapped")
    assert a.weights_digest == b.weights_digest
    assert not a.module.training
    assert not any(p.requires_grad for p in a.module.parameters())


def test_a_factory_keeps_a_prefix_of_its_own(factories, tmp_path):
    state = {"model.weight": torch.eye(2), "model.bias": torch.ones(2)}
    path = saved(tmp_path / "w.pt", {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    network = load_network(f"{factories}:Wrapped", path, torch.float32)
    assert same(dict(network.module.state_dict()), state)
    assert network.weights == str(path)


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        (":absent", "has no absent"),
        (":broken", "ValueError: no GPU today"),
        (":nothing", "returned a int"),
        (":constant", "must be callable"),
        ("_absent:make", "ModuleNotFoundError"),
        (":", "package.module:factory"),
    ],
)
def test_a_factory_that_cannot_be_used_says_why(factories, suffix, said):
    with pytest.raises(InputError, match=said):
        load_network(factories + suffix, None, torch.float32)


def test_options_of_resnets_are_refused_for_a_factory(factories):
    with pytest.raises(InputError) as caught:
        load_network(f"{factories}:Wrapped", Path("random"), torch.float32, pool="max")
    assert "pool 'max'" in str(caught.value)
    assert "weights 'random'" in str(caught.value)


# ------------------------------------------------------------------------------------------------- wrap


def test_wrapping_copies_and_never_changes_the_users_module():
    module = small().train()
    before = copy.deepcopy(module.state_dict())
    network = wrap_network(module, torch.float64)
    assert module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert same(before, module.state_dict())
    assert not network.module.training
    assert {p.dtype for p in network.module.parameters()} == {torch.float64}
    assert (network.name, network.weights, network.normalize) == ("Sequential", "in memory", "none")
    assert network.weights_digest == weights_digest(module.state_dict())


def test_a_buffer_outside_the_state_dict_is_part_of_the_digest():
    module = WithBuffer()
    other = copy.deepcopy(module)
    other.scale.fill_(4.0)
    digests = {wrap_network(m, torch.float32).weights_digest for m in (module, other)}
    assert len(digests) == 2


def test_modules_that_cannot_be_used_are_refused():
    bad = small()
    with torch.no_grad():
        bad[2].bias[0] = float("nan")
    with pytest.raises(InputError, match=r"2\.bias has 1 of 2"):
        wrap_network(bad, torch.float32)
    with torch.device("meta"):
        hollow = small()
    with pytest.raises(InputError, match=r"0\.weight is on the meta device"):
        wrap_network(hollow, torch.float32)
    with pytest.raises(InputError, match="found a dict"):
        wrap_network({}, torch.float32)
    with pytest.raises(InputError, match="weight is not made yet"):
        wrap_network(nn.LazyLinear(2), torch.float32)


def test_a_module_that_only_its_own_code_could_copy_is_refused():
    class Unique(nn.Linear):
        def __deepcopy__(self, memo):
            raise ValueError("there is only one")

    with pytest.raises(InputError, match=r"Unique cannot be copied \(ValueError: there is only one\)"):
        wrap_network(nn.Sequential(Unique(2, 2)), torch.float32)


class Holder(nn.Module):
    """Holds what `copy.deepcopy` refuses, beside what must be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.Linear(3, 3))
        self.inner[0].lock = threading.Lock()
        self.inner[0].library = torch
        self.operator = torch.ops.aten.relu.default
        self.kept = {"weight": self.linear.weight * 2, "module": self.linear, "lock": threading.Lock()}
        self.pair = [self.linear.weight, self.linear.bias]
        self.linear.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.activation = output

    def forward(self, x: Tensor) -> Tensor:
        with self.inner[0].lock:
            return x + self.operator(self.inner(self.linear(x)))


def test_what_cannot_be_copied_is_shared_and_all_else_copied():
    module = Holder()
    x = torch.ones(1, 3)
    expected = module(x)  # keeps an activation with its history
    found = wrap_network(module, torch.float32).module
    assert torch.equal(found(x), expected)
    assert found.inner[0].lock is module.inner[0].lock
    mine = {t.data_ptr() for t in [*module.parameters(), module.activation, module.kept["weight"]]}
    assert not mine & {t.data_ptr() for t in [*found.parameters(), found.activation, found.kept["weight"]]}
    assert found.kept["module"] is found.linear
    assert found.pair[0] is found.linear.weight
    assert all(p.requires_grad for p in module.parameters())
    kept = module.activation
    found(2 * x)
    assert module.activation is kept


def test_a_compiled_module_is_copied_as_it_was_written():
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    whole, part = copy.deepcopy(plain), copy.deepcopy(plain)
    whole.compile(backend="eager")
    part[1] = torch.compile(part[1], backend="eager")
    expected = copy.deepcopy(plain).double()(x)
    for module in (whole, part, torch.compile(copy.deepcopy(plain), backend="eager")):
        found = wrap_network(module, torch.float64).module
        assert torch.equal(found(x), expected)
        assert [name for name, _ in found.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda m: torch.nn.utils.weight_norm(m),
        lambda m: torch.nn.utils.parametrizations.weight_norm(m),
        lambda m: torch.nn.utils.spectral_norm(m),
        lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    ],
)
def test_weights_that_are_computed_are_computed_in_the_copy_too(reparametrise):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    reparametrise(module[0])
    x = torch.randn(1, 4)
    module(x)
    found = wrap_network(module, torch.float64).module
    assert found(x.double()).dtype == torch.float64
    assert torch.allclose(found(x.double()).float(), module.eval()(x), atol=1e-6)


def test_infinities_in_a_buffer_are_values_and_in_a_parameter_not():
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert torch.equal(wrap_network(module, torch.float64).module.mask, module.mask.double())
    module.mask[0] = torch.nan
    with pytest.raises(InputError, match="mask has 2 of 2"):
        wrap_network(module, torch.float64)
    module.mask = torch.tensor([0.0, 1e300], dtype=torch.float64)
    with pytest.raises(InputError, match="float32: mask has 1 of 2"):
        wrap_network(module, torch.float32)


# ---------------------------------------------------------------------------------------------- complex


class Modes(nn.Module):
    """A Fourier layer with a complex weight, and a complex buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64, generator=generator))
        self.register_buffer("phase", torch.exp(1j * torch.arange(5.0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight * self.phase, n=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_numbers_take_the_complex_type_of_the_precision(dtype, tmp_path, factories):
    module = Modes()
    found = wrap_network(module, dtype).module
    assert {found.weight.dtype, found.phase.dtype} == {dtype.to_complex()}
    assert torch.equal(found.weight.to(torch.complex64), module.weight)
    assert torch.equal(found.phase.to(torch.complex64), module.phase)
    path = saved(tmp_path / "w.pt", {"weight": module.weight})
    fit_state(other := Modes(), read_checkpoint(path), dtype, str(path))
    assert torch.equal(other.weight, module.weight.to(dtype.to_complex()))
    assert "needs complex64 (5,), found float32" in misfit(Modes(), {"weight": torch.ones(5)})
    assert "needs float32 (2, 2), found complex64" in misfit(
        nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2, dtype=torch.complex64)}
    )


def test_integers_that_do_not_fit_are_a_mismatch():
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer("places", torch.zeros(2, dtype=torch.int8))
    state = {"weight": torch.ones(1, 1), "places": torch.tensor([1, 300])}
    assert "places: the network needs int8 (2,), found int64" in misfit(module, state)
    fit_state(module, state | {"places": torch.tensor([1, 100])}, torch.float32, "a.pt")
    assert module.places.tolist() == [1, 100]
