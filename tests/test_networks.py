"""Networks as people have them: complex numbers, hooks, randomness, state, and blocks that cannot be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from typer.testing import CliRunner

import stiffcore
from stiffcore.cli import app
from tests.cases import seeded
from tests.reference import dense_eigenvalues, matched_distance

COMPLEX = torch.complex64


# ---------------------------------------------------------------------------------------------- complex numbers


def drawn(*shape, dtype=COMPLEX):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Modes(nn.Module):
    """A Fourier layer with a complex weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(drawn(9))

    def forward(self, x):
        return x + torch.fft.irfft(torch.fft.rfft(torch.relu(x)) * self.weight, n=16)


class Modulus(nn.Module):
    """A function of moduli alone, at values with no real part: a slope along the real axis is 0 there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", 1j * drawn(16, 16, dtype=torch.float32))

    def forward(self, x):
        return x + (x.to(self.weight.dtype) @ self.weight).abs()


class ComplexTanh(nn.Module):
    """Complex arithmetic between two real layers, as real pairs at the end."""

    def __init__(self):
        super().__init__()
        self.weight, self.up = nn.Parameter(drawn(16, 8) / 4), nn.Parameter(drawn(16, 16, dtype=torch.float32) / 4)

    def forward(self, x):
        inside = torch.tanh(torch.complex(x, 0.3 * x) @ self.weight)
        return torch.relu(x + torch.view_as_real(inside).flatten(1) @ self.up)


class ComplexConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(1, 1, 3, padding=1, dtype=COMPLEX) for _ in range(2))

    def forward(self, x):
        z = self.a(x.reshape(1, 1, 4, 4).to(self.a.weight.dtype))
        z = self.b(torch.complex(torch.relu(z.real), torch.relu(z.imag)))
        return torch.relu(x + (z.real + 0.5 * z.imag).reshape(1, 16))


@pytest.mark.parametrize("kind", [Modes, Modulus, ComplexTanh, ComplexConvolution])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_complex_weights_keep_their_imaginary_parts(kind, dtype):
    torch.manual_seed(0)
    module, x = kind(), seeded((1, 16), 1)
    exact = kind()
    exact.load_state_dict(module.state_dict())
    exact._apply(lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64))
    truth = dense_eigenvalues(exact, x)
    assert np.abs(truth.imag).max() > 0.01
    found = stiffcore.spectrum(module, x, dtype=dtype)
    assert found.certificate.passed
    assert matched_distance(found.values, truth) < (1e-12 if dtype == "float64" else 1e-4)
    assert {t.dtype for t in module.state_dict().values()} <= {torch.complex64, torch.float32}


# -------------------------------------------------------------------------------------------------------- hooks


class Residual(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x, shift=None):
        out = x + self.b(torch.tanh(self.a(x)))
        return out if shift is None else out + shift


class Net(nn.Module):
    """A stem, a block, a head; `before` and `around` change the way to the block and the call of it."""

    def __init__(self, block=None, before=lambda x: x, around=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(3, 3, 1), block or Residual()
        self.head = nn.Linear(3 * 16, 4)
        self.before, self.around = before, around

    def forward(self, x):
        return self.head(self.around(self.block, self.before(self.stem(x))).flatten(1))


def image(seed=1):
    return seeded((1, 3, 4, 4), seed)


def spectrum_of(net, tmp_path, **options):
    """The stored eigenvalues of `block`, and the network as it was run."""
    run = stiffcore.analyze(net, image(), run=tmp_path / "run", blocks="block", memory="3GiB", **options)
    found = run.spectrum(block="block")
    assert found.certificate.passed
    return found.values


def halve(module, args):
    return (args[0] * 0.5 + 1, *args[1:])


def halve_named(module, args, kwargs):
    return (args[0] * 0.5 + 1,), kwargs | {"shift": 2 * args[0]}


def bend(module, args, output):
    return torch.sin(output)


def raise_by_one(module, args):
    return (args[0] + args[0] ** 2,) if isinstance(module, Residual) else None


HOOKS = {
    "pre": lambda block: block.register_forward_pre_hook(halve),
    "pre, with keywords": lambda block: block.register_forward_pre_hook(halve_named, with_kwargs=True),
    "pre, two": lambda block: [block.register_forward_pre_hook(halve) for _ in range(2)],
    "pre, prepended": lambda block: block.register_forward_pre_hook(halve, prepend=True),
    "after": lambda block: block.register_forward_hook(bend),
    "of a part": lambda block: block.a.register_forward_pre_hook(halve),
    "of all modules": lambda block: torch.nn.modules.module.register_module_forward_pre_hook(raise_by_one),
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_function_is_what_the_network_applies_hooks_included_once(name, tmp_path):
    net = Net().double()
    handle = HOOKS[name](net.block)
    try:
        given = net.stem(image()).detach()
        truth = dense_eigenvalues(net.block, given)
        assert matched_distance(spectrum_of(net, tmp_path), truth) < 1e-10
        plain = Residual().double()
        plain.load_state_dict(net.block.state_dict())
        if name != "of all modules":
            assert matched_distance(dense_eigenvalues(plain, given), truth) > 1e-3
    finally:
        if name == "of all modules":
            handle.remove()


@pytest.mark.parametrize(
    "around",
    [
        lambda block, x: block(x, shift=x.mean()),
        lambda block, x: block(x=x),
        lambda block, x: block(shift=0.5, x=x),
        lambda block, x: block(x, x.detach().clone()),
    ],
)
def test_other_arguments_are_as_they_were(around, tmp_path):
    net = Net(around=around).double()
    # the derivative by the first tensor does not depend on what is added
    first = Net(around=lambda block, x: block(x)).double()
    truth = dense_eigenvalues(first.block, first.stem(image()).detach())
    assert matched_distance(spectrum_of(net, tmp_path), truth) < 1e-10


class Scaled(nn.Module):
    """Multiplies by its second argument."""

    def forward(self, x, by):
        return x * by["scale"] + torch.sin(x)


def test_an_argument_that_the_network_changes_afterwards_is_as_it_was(tmp_path):
    def around(block, x):
        by = {"scale": torch.full_like(x, 2.0)}
        y = block(x, by)
        by["scale"].fill_(100.0)
        return y

    net = Net(Scaled(), around=around).double()
    given = net.stem(image()).detach()
    truth = 2 + torch.cos(given).reshape(-1).numpy()
    assert matched_distance(spectrum_of(net, tmp_path), truth) < 1e-10


# --------------------------------------------------------------------------------------------------- randomness


def refused(net, tmp_path, **options):
    with pytest.raises(stiffcore.InputError) as caught:
        stiffcore.analyze(net, image(), run=tmp_path / "run", **({"blocks": "block", "memory": "3GiB"} | options))
    assert not (tmp_path / "run").exists()
    return str(caught.value)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Rarely(nn.Module):
    """Something else, one time in eight."""

    def forward(self, x):
        return x * (2.0 if torch.rand(()) < 0.125 else 1.0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_dropout_before_a_block_is_refused_by_the_name_of_the_block_and_of_where_it_is(tmp_path):
    message = refused(Net(before=F.dropout), tmp_path)
    assert "block block is given another input each time" in message
    assert "the network's own forward is not deterministic" in message


@pytest.mark.parametrize("kind", [Noise, Rarely, Counting])
def test_a_module_that_changes_the_way_to_a_block_is_named(kind, tmp_path):
    net = Net()
    net.stem = nn.Sequential(net.stem, nn.Sequential(nn.Identity(), kind()))
    assert "module stem.1.1 is not deterministic" in refused(net, tmp_path)


def test_random_numbers_from_numpy_and_python_are_seen_too(tmp_path):
    import random

    draws = (random.random, np.random.default_rng(0).random, np.random.rand)
    for draw in draws:
        assert "not deterministic" in refused(Net(before=lambda x, draw=draw: x * draw()), tmp_path)


def test_random_numbers_that_change_nothing_are_no_reason_to_refuse(tmp_path):
    def before(x):
        torch.rand(3)
        return x

    net = Net(before=before).double()
    truth = dense_eigenvalues(net.block, net.stem(image()).detach())
    assert matched_distance(spectrum_of(net, tmp_path), truth) < 1e-10


def test_randomness_after_the_blocks_is_not_on_the_way_to_them(tmp_path):
    net = Net(around=lambda block, x: F.dropout(block(x))).double()
    truth = dense_eigenvalues(net.block, net.stem(image()).detach())
    assert matched_distance(spectrum_of(net, tmp_path), truth) < 1e-10


class Statistics(nn.Module):
    """Normalises by a running mean that each call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        y = x - self.mean
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return y


def test_buffers_that_a_pass_changes_are_the_same_for_every_image(tmp_path):
    net = Net()
    net.stem = nn.Sequential(net.stem, Statistics())
    net = net.double()
    images = torch.cat([image(1), image(2), image(3)])
    together = stiffcore.analyze(net, images, run=tmp_path / "three", blocks="block", memory="3GiB")
    for i in range(3):
        alone = stiffcore.analyze(net, images[i : i + 1], run=tmp_path / str(i), blocks="block", memory="3GiB")
        assert np.array_equal(together.spectrum(i, "block").values, alone.spectrum(0, "block").values)
    assert net.stem[1].calls == 0


# ------------------------------------------------------------------------------- blocks and networks that fail


class Pair(Residual):
    def forward(self, x):
        return {"none": None, "found": (x.argmax(), super().forward(x))}


class Whole(Residual):
    def forward(self, x):
        return super().forward(x).argmax(1)


class WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("no backward here")


class Broken(Residual):
    """Works in the pass, fails when it is differentiated."""

    def forward(self, x):
        return super().forward(WithoutBackward.apply(x))


class Untraceable(Residual):
    """Has none of it."""

    def forward(self, x):
        if get_proxy_mode() is not None:
            raise TypeError("no proxies here")
        return super().forward(x)


class Blocks(nn.Module):
    def __init__(self, *blocks, call=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.call = nn.ModuleList(blocks), call

    def forward(self, x):
        for block in self.blocks:
            y = self.call(block, x)
            x = y if isinstance(y, Tensor) and y.is_floating_point() else x
        return x.mean((2, 3))


def test_a_block_that_returns_several_things_is_taken_by_its_first_floating_tensor(tmp_path):
    net = Blocks(Pair(), Residual()).double()
    run = stiffcore.analyze(net, image(), run=tmp_path / "run", memory="3GiB")
    assert {record.unit.block for record in run.records().values()} == {"blocks.0", "blocks.1"}
    plain = lambda x: net.blocks[0](x)["found"][1]  # noqa: E731
    assert matched_distance(run.spectrum(block="blocks.0").values, dense_eigenvalues(plain, image())) < 1e-10


def test_where_a_block_cannot_be_had_the_others_go_on_and_the_run_says_so(tmp_path, monkeypatch):
    net = Blocks(Residual(), Whole(), Residual()).double()
    asked = {"blocks": "blocks.0,blocks.1,blocks.2", "memory": "3GiB"}
    run = stiffcore.analyze(net, image(), run=tmp_path / "run", **asked)
    rows = run.metrics().set_index("block")
    assert rows["state"].to_dict() == {"blocks.0": "done", "blocks.1": "failed", "blocks.2": "done"}
    assert "floating tensor" in rows["note"]["blocks.1"]
    with pytest.raises(stiffcore.InputError, match=r"failed; .*floating tensor"):
        run.spectrum(block="blocks.1")
    for command in (["status"], ["show"]):
        assert "failed" in CliRunner().invoke(app, [*command, str(tmp_path / "run")], terminal_width=200).output
    before = run.spectrum(block="blocks.0").values
    # it is tried again, and only it
    monkeypatch.setattr(Whole, "forward", Residual.forward)
    again = stiffcore.analyze(net, image(), run=tmp_path / "run", **asked)
    assert set(again.metrics()["state"]) == {"done"}
    assert np.array_equal(again.spectrum(block="blocks.0").values, before)


def test_a_block_that_runs_twice_or_takes_no_tensor_fails_alone(tmp_path):
    net = Blocks(Residual(), Residual(), call=lambda block, x: block(x)).double()
    net.blocks.append(net.blocks[0])
    run = stiffcore.analyze(net, image(), run=tmp_path / "run", blocks="blocks.0,blocks.1", memory="3GiB")
    rows = run.metrics().set_index("block")
    assert rows["state"].to_dict() == {"blocks.0": "failed", "blocks.1": "done"}
    assert "runs 2 times" in rows["note"]["blocks.0"]


def test_no_block_at_all_is_refused_with_every_reason(tmp_path):
    message = refused(Blocks(Whole(), Broken()).double(), tmp_path, blocks="blocks.0,blocks.1")
    assert "no block can be analysed" in message
    assert "floating tensor" in message
    assert "cannot be differentiated" in message


def test_what_blocks_all_leaves_out_is_said_with_the_reason(tmp_path):
    net = Blocks(Residual(), Untraceable()).double()
    net.blocks.extend([shared := Residual().double(), shared])
    run = stiffcore.analyze(net, image(), run=tmp_path / "run", memory="3GiB")
    assert {record.unit.block for record in run.records().values()} == {"blocks.0"}
    left_out = run.header.left_out
    assert "no proxies here" in left_out["blocks.1"]
    assert "runs 2 times" in left_out["blocks.2"]
    status = CliRunner().invoke(app, ["status", str(tmp_path / "run")]).output
    assert "left out of --blocks all: block blocks.1 " in status
    assert (
        json.loads(CliRunner().invoke(app, ["status", str(tmp_path / "run"), "--json"]).output)["left_out"] == left_out
    )
    message = refused(Blocks(Untraceable()).double(), tmp_path / "other", blocks="all")
    assert "no residual block was found" in message
    assert "no proxies here" in message


@pytest.mark.parametrize(
    "error", [AssertionError("wants 224"), IndexError("3"), AttributeError("shape"), KeyError("size"), OSError("disk")]
)
def test_a_network_that_refuses_an_image_by_any_error_is_one_message(error, tmp_path):
    def before(x):
        raise error

    message = refused(Net(before=before), tmp_path)
    assert "does not take an image of shape (1, 3, 4, 4)" in message
    assert type(error).__name__ in message


def test_a_hook_that_fails_is_one_message(tmp_path):
    net = Net()
    net.block.register_forward_hook(lambda module, args, output: output["hidden"])
    assert "does not take an image" in refused(net, tmp_path)


@pytest.mark.parametrize(
    "before",
    [
        lambda x: (x.flatten(2) @ torch.eye(16, dtype=torch.float32)).view(x.shape),
        lambda x: nn.Conv2d(3, 3, 1, dtype=torch.float32)(x),
        lambda x: F.linear(x, torch.ones(4, 4)),
    ],
)
def test_float32_inside_names_the_option_that_helps(before, tmp_path):
    assert "--dtype float32" in refused(Net(before=before), tmp_path)


def test_with_float32_asked_for_a_float32_constant_is_no_problem(tmp_path):
    net = Net(before=lambda x: x @ torch.eye(4))
    assert "--dtype float32" in refused(net, tmp_path)
    run = stiffcore.analyze(net, image(), run=tmp_path / "run", blocks="block", dtype="float32", memory="3GiB")
    truth = dense_eigenvalues(net.block, net.stem(image().float()).detach())
    assert matched_distance(run.spectrum(block="block").values, truth) < 1e-4


FACTORIES = """
import torch
from tests.test_networks import Blocks, Residual, Untraceable, Whole

def some():
    return Blocks(Residual(), Untraceable(), Whole(), Residual())
"""


def test_the_command_line_says_what_failed_and_what_was_left_out_and_does_not_exit_0(tmp_path, monkeypatch):
    (tmp_path / "some_blocks.py").write_text(FACTORIES)
    np.savez(tmp_path / "one.npz", x=np.full((1, 4, 4, 3), 100, np.uint8), y=np.zeros(1, int))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    common = ["--network", "some_blocks:some", "--images", "one.npz", "--memory", "4GiB"]
    named = [*common, "--blocks", "blocks.0,blocks.2"]

    def called(*args):
        program = [sys.executable, "-c", "from stiffcore.cli import main; main()", *map(str, args)]
        environment = os.environ | {"PYTHONPATH": f"{Path(stiffcore.__file__).parents[1]}"}
        return subprocess.run(program, capture_output=True, text=True, check=False, env=environment, timeout=300)

    ran = called("run", "run", *named, "--workers", 1)
    assert ran.returncode == 1
    assert "1 units failed" in ran.stderr
    assert "floating tensor" in ran.stderr
    assert "1 spectrum in run" in ran.stdout
    refused_all = called("plan", "other", *common, "--memory", "1MiB")
    assert refused_all.returncode == 2
    assert "the budget is too small" in refused_all.stderr
    assert "refused" in refused_all.stdout
    assert "left out of --blocks all: block blocks.1" in refused_all.stdout


def test_images_are_given_by_a_path_too(tmp_path):
    (tmp_path / "images" / "grey").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 100, np.uint8)).save(tmp_path / "images" / "grey" / "a.png")
    found = stiffcore.analyze(Net(), tmp_path / "images", run=tmp_path / "run", blocks="block", memory="3GiB")
    assert set(found.metrics()["state"]) == {"done"}
