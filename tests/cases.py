"""Small functions with square Jacobians, of every kind that the reduction treats differently."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def seeded(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(module, seed=0, gain=1.0):
    """Eval mode, float64, weights and running statistics all generic: no zero bias, no unit variance."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval().requires_grad_(False)
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        if not p.is_floating_point():
            continue  # num_batches_tracked
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            p.copy_(0.5 + noise.abs())
        elif p.ndim > 1:
            p.copy_(gain * noise / p[0].numel() ** 0.5)
        elif name.endswith("weight"):
            p.copy_(1 + 0.3 * noise)
        else:
            p.copy_(0.3 * noise)
    return module


def conv(c_in, c_out, size=3, **options):
    return nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False, **options)


class Basic(nn.Module):
    """conv bn act conv bn, + x, outer."""

    def __init__(self, c=3, act=nn.ReLU, outer=nn.ReLU, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1, self.act = conv(c, c), norm(c), act()
        self.conv2, self.norm2, self.outer = conv(c, c), norm(c), outer()

    def forward(self, x):
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.outer(out + x)


class Bottleneck(nn.Module):
    def __init__(self, c=6, width=2):
        super().__init__()
        self.body = nn.Sequential(
            conv(c, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv(width, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv(width, c, 1),
            nn.BatchNorm2d(c),
        )

    def forward(self, x):
        out = self.body(x)
        out += x
        return F.relu_(out)


class PreActivation(nn.Module):
    """ResNet v2: nothing after the sum."""

    def __init__(self, c=4, inplace=False):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(c), conv(c, 2), nn.BatchNorm2d(2), conv(2, c)
        self.inplace = inplace

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=self.inplace)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=self.inplace)) + x


class ReluOnItsInput(nn.Module):
    """The in-place ReLU changes what the skip adds: y = relu(x) + F(relu(x)), not x + F(relu(x))."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.conv2 = conv(c, 2), conv(2, c)

    def forward(self, x):
        out = F.relu_(x)
        out = self.conv2(F.relu(self.conv1(out)))
        return out + x


class Composition(nn.Module):
    """No skip at all."""

    def __init__(self, c=4):
        super().__init__()
        self.body = nn.Sequential(conv(c, 2), nn.BatchNorm2d(2), nn.ReLU(), conv(2, c), nn.BatchNorm2d(c), nn.ReLU())

    def forward(self, x):
        return self.body(x)


class Projection(nn.Module):
    """A projection shortcut that keeps the shape."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.conv2, self.short, self.bn = conv(c, c), conv(c, c), conv(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.bn(self.short(x)))


class ProjectionOfASum(nn.Module):
    """A projection shortcut, and a branch that ends in a sum of its own."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.a, self.b, self.short = conv(c, 2), conv(2, c), conv(2, c, 1), conv(c, c, 1)

    def forward(self, x):
        h = F.relu(self.conv1(x))
        return F.relu((self.a(h) + self.b(h)) + self.short(x))


class SqueezeExcite(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.conv2, self.down, self.up = conv(c, c), conv(c, c), nn.Linear(c, 2), nn.Linear(2, c)

    def forward(self, x):
        out = self.conv2(F.relu(self.conv1(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(out.mean((2, 3))))))
        return F.relu(out * gate[:, :, None, None] + x)


class NestedSum(nn.Module):
    """x + A(x) + B(x): no node but the sum sees both branches, yet each has its own narrow place."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2, self.b1, self.b2 = conv(c, 1), conv(1, c), conv(c, 1), conv(1, c)

    def forward(self, x):
        return F.relu((x + self.a2(F.relu(self.a1(x)))) + self.b2(F.relu(self.b1(x))))


class SharedStem(nn.Module):
    """The two terms beside the skip share a waist."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2, self.b2 = conv(c, 2), conv(2, c), conv(2, c)

    def forward(self, x):
        h = F.relu(self.a1(x))
        return F.relu(self.a2(h) + (x + torch.tanh(self.b2(h))))


class Doubling(nn.Module):
    """relu(x + x + F(x)): the skip counts twice."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 1), conv(1, c)

    def forward(self, x):
        return F.relu(x + x + self.a2(F.relu(self.a1(x))))


class TwiceTheBranch(nn.Module):
    """The same term is added two times."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 2), conv(2, c)

    def forward(self, x):
        out = self.a2(F.relu(self.a1(x)))
        return F.relu(out + (x + out))


class LayerScale(nn.Module):
    """ConvNeXt's block: depthwise, channels last, a scale before the sum, drop-path off."""

    def __init__(self, c=4):
        super().__init__()
        self.dw = conv(c, c, groups=c)
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 8), nn.Linear(8, c)
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x):
        out = self.norm(self.dw(x).permute(0, 2, 3, 1))
        out = self.gamma * self.down(F.gelu(self.up(out)))
        return x + out.permute(0, 3, 1, 2)


class InvertedResidual(nn.Module):
    """MobileNetV2: wider inside, ReLU6 saturating on both sides, linear at the end."""

    def __init__(self, c=2, wide=6):
        super().__init__()
        self.body = nn.Sequential(
            conv(c, wide, 1),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            conv(wide, wide, groups=wide),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            conv(wide, c, 1),
            nn.BatchNorm2d(c),
        )

    def forward(self, x):
        return x + self.body(4 * x)


class ControlFlow(nn.Module):
    """Python decides, from the numbers, what is computed."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2, self.other = conv(c, 2), conv(2, c), conv(2, c)

    def forward(self, x):
        h = F.relu(self.a1(x))
        for _ in range(2):
            h = h * 0.9
        out = self.a2(h) if float(x.sum()) < 1e9 else self.other(h)
        return F.relu(out + x)


class Buffered(nn.Module):
    """Writes its result into a tensor it made itself, channel by channel."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 2), conv(2, c)

    def forward(self, x):
        out = torch.empty_like(x)
        full = self.a2(F.relu(self.a1(x)))
        for channel in range(x.shape[1]):
            out[:, channel] = full[:, channel] + x[:, channel]
        return F.relu(out)


class PermutedSkip(nn.Module):
    """The skip is a view of permuted data, of the right shape: not the identity."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 1), conv(1, c)

    def forward(self, x):
        skip = x.transpose(2, 3).reshape(x.shape)
        return F.relu(self.a2(F.relu(self.a1(x))) + skip)


class ViewedSkip(nn.Module):
    """The skip goes through views and copies that change nothing: it is the identity."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 1), conv(1, c)

    def forward(self, x):
        skip = x.flatten(1).unsqueeze(0).clone().reshape(x.shape).contiguous(memory_format=torch.channels_last)
        return F.relu(self.a2(F.relu(self.a1(x))) + skip).flatten(1).view(x.shape)


class ChannelBroadcast(nn.Module):
    """x + s(x), s broadcast over a plane: a sum of two shapes."""

    def __init__(self, c=4):
        super().__init__()
        self.lin = nn.Linear(c, c)

    def forward(self, x):
        return F.relu(x + F.relu(self.lin(x.mean((2, 3))))[:, :, None, None])


class TensorClamp(nn.Module):
    """Elementwise operations with tensors for arguments, one of them the same tensor twice."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2, self.top = conv(c, 2), conv(2, c), nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        h = self.a1(x)
        h = torch.clamp(h, min=h)  # does nothing to h; its derivative is 1, or 1/2 each
        out = torch.clamp(self.a2(F.relu(h)), max=self.top)
        return torch.minimum(out + x, self.top + 1)


class Subtracted(nn.Module):
    """x - F(x), and a sum with a factor: no plain sum to open."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 1), conv(1, c)

    def forward(self, x):
        out = self.a2(F.relu(self.a1(x)))
        return F.relu(torch.add(x - out, out, alpha=3))


class DetachedSkip(nn.Module):
    """The skip carries the values but, by the function's own word, no derivative."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 1), conv(1, c)

    def forward(self, x):
        return F.relu(self.a2(F.relu(self.a1(x))) + x.detach())


class Masked(nn.Module):
    """Attention over positions with -inf in its scores."""

    def __init__(self, c=6):
        super().__init__()
        self.score, self.up = nn.Linear(c, 3), nn.Linear(3, c)

    def forward(self, x):
        score = self.score(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)
        return x + self.up(torch.softmax(score, -1))


class ZeroBranch(nn.Module):
    """Zero-initialised residual: the last normalisation has weight 0, as in a network before training."""

    def __init__(self, c=3):
        super().__init__()
        self.block = Basic(c)

    def forward(self, x):
        return self.block(x)


class DeadUnits(nn.Module):
    """Half of the waist's units are switched on but lead nowhere (pruned channels)."""

    def __init__(self, c=4):
        super().__init__()
        self.a1, self.a2 = conv(c, 2), conv(2, c)

    def forward(self, x):
        return F.relu(self.a2(F.softplus(self.a1(x))) + x)


class RMS(nn.Module):
    def __init__(self, c=6):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(c), nn.Linear(c, 3), nn.Linear(3, c)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


class Spectral(nn.Module):
    """A Fourier layer: complex numbers inside."""

    def __init__(self, c=3):
        super().__init__()
        self.mix = nn.Linear(c, c)

    def forward(self, x):
        modes = torch.fft.rfft2(x)[:, :, :3, :2]
        out = torch.fft.irfft2(modes * (0.5 + 0.2j), s=x.shape[-2:])
        return F.gelu(self.mix(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) + x


class Pooled(nn.Module):
    """Max-pool inside with ties, and nearest upsampling."""

    def __init__(self, c=3):
        super().__init__()
        self.a1, self.a2 = conv(c, c), conv(c, c)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.a1(x)), 2)
        return F.relu(self.a2(F.interpolate(h, scale_factor=2)) + x)


def zeroed(module, *names):
    parameters = dict(module.named_parameters())
    for name in names:
        parameters[name].zero_()
    return module


def dead_units():
    module = randomised(DeadUnits())
    module.a2.weight[:, 1] = 0
    return module


def all_inactive():
    module = randomised(Basic())
    module.norm2.bias.fill_(-100.0)
    return module


def all_waist_inactive():
    module = randomised(Basic())
    module.norm1.bias.fill_(-100.0)
    return module


def wide():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a1, self.a2 = conv(2, 8), conv(8, 2)

        def forward(self, x):
            return F.relu(self.a2(F.relu(self.a1(x))) + x)

    return randomised(Wide())


def timm_block(name):
    from timm.models import resnet

    if name == "basic":
        return randomised(resnet.BasicBlock(4, 4))
    return randomised(resnet.Bottleneck(8, 2))


def torchvision_block(name):
    from torchvision.models import resnet

    if name == "basic":
        return randomised(resnet.BasicBlock(4, 4))
    return randomised(resnet.Bottleneck(8, 2))


def transformer(norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.3, activation=activation, batch_first=True, norm_first=norm_first
    )
    return randomised(layer)


@dataclass(frozen=True)
class Case:
    """One function and its point.

    Attributes:
        build: makes the function.
        shape: of its input.
        route: the matrix that the block must be solved by: `waist` with the skip off, `waist0` without a skip,
            `active` or `full`.
        branch: the same for the residual function; None where there is none.
        defective: multiple eigenvalues, which no eigenvector certifies.
        scale: of the input.
        point: the input itself, where not random.
        residual: makes the branch by hand from the function, independently of the graph.
    """

    build: Callable
    shape: tuple = (1, 4, 4, 4)
    route: str = "waist"
    branch: str | None = "waist0"
    defective: bool = False
    scale: float = 1.0
    point: Callable | None = None
    residual: Callable | None = None

    def open(self):
        x = self.point() if self.point else self.scale * seeded(self.shape, 1)
        return self.build(), x


def without_skip(module):
    """The branch where nothing follows the sum."""
    return lambda t: module(t) - t


def basic_branch(module):
    return lambda t: module.norm2(module.conv2(module.act(module.norm1(module.conv1(t)))))


C3, C6, C8 = (1, 3, 4, 4), (1, 6, 4, 4), (1, 8, 4, 4)
MATRIX = seeded((5, 5), 7)

CASES = {
    "basic": Case(lambda: randomised(Basic()), C3, residual=basic_branch),
    "bottleneck": Case(lambda: randomised(Bottleneck()), C6, residual=lambda m: m.body),
    "pre_activation": Case(lambda: randomised(PreActivation()), residual=without_skip),
    "pre_activation_inplace": Case(lambda: randomised(PreActivation(inplace=True))),
    "group_norm": Case(lambda: randomised(Basic(4, norm=lambda c: nn.GroupNorm(2, c)))),
    "instance_norm": Case(lambda: randomised(Basic(norm=lambda c: nn.InstanceNorm2d(c, affine=True))), C3),
    "gelu_inside": Case(lambda: randomised(Basic(4, act=nn.GELU)), route="active", branch="full"),
    "leaky_inside": Case(lambda: randomised(Basic(4, act=lambda: nn.LeakyReLU(0.2))), route="active", branch="full"),
    "gelu_after": Case(lambda: randomised(Basic(outer=nn.GELU)), C3, route="full", residual=basic_branch),
    "leaky_after": Case(lambda: randomised(Basic(outer=lambda: nn.LeakyReLU(0.1))), C3, route="full"),
    "relu6_after": Case(lambda: randomised(Basic(outer=nn.ReLU6)), C3, scale=4.0),
    "hardtanh_after": Case(lambda: randomised(Basic(outer=nn.Hardtanh)), C3),
    "hardswish_after": Case(lambda: randomised(Basic(outer=nn.Hardswish)), C3, route="active", scale=3.0),
    "relu_on_its_input": Case(lambda: randomised(ReluOnItsInput()), route="waist0"),
    "composition": Case(lambda: randomised(Composition()), route="waist0", branch=None),
    "projection": Case(
        lambda: randomised(Projection()),
        route="active",
        residual=lambda m: lambda t: m.conv2(F.relu(m.conv1(t))),
    ),
    "projection_of_a_sum": Case(
        lambda: randomised(ProjectionOfASum()),
        route="active",
        residual=lambda m: lambda t: m.a(F.relu(m.conv1(t))) + m.b(F.relu(m.conv1(t))),
    ),
    "squeeze_excite": Case(lambda: randomised(SqueezeExcite())),
    "nested_sum": Case(
        lambda: randomised(NestedSum()),
        route="active",
        branch="full",
        residual=lambda m: lambda t: m.a2(F.relu(m.a1(t))) + m.b2(F.relu(m.b1(t))),
    ),
    "shared_stem": Case(lambda: randomised(SharedStem())),
    "doubling": Case(
        lambda: randomised(Doubling()),
        route="active",
        branch="full",
        residual=lambda m: lambda t: t + m.a2(F.relu(m.a1(t))),
    ),
    "twice_the_branch": Case(lambda: randomised(TwiceTheBranch())),
    "layer_scale": Case(lambda: randomised(LayerScale()), route="full", branch="full", residual=without_skip),
    "inverted_residual": Case(
        lambda: randomised(InvertedResidual()), (1, 2, 4, 4), route="any", branch="any", residual=without_skip
    ),
    "control_flow": Case(lambda: randomised(ControlFlow())),
    "buffered": Case(lambda: randomised(Buffered()), route="any", branch=None),
    "permuted_skip": Case(lambda: randomised(PermutedSkip()), route="active"),
    "viewed_skip": Case(lambda: randomised(ViewedSkip())),
    "channel_broadcast": Case(lambda: randomised(ChannelBroadcast()), route="active", branch=None),
    "tensor_clamp": Case(lambda: randomised(TensorClamp()), route="any", branch=None),
    "subtracted": Case(lambda: randomised(Subtracted()), route="active", branch=None),
    "detached_skip": Case(lambda: randomised(DetachedSkip()), route="active", branch=None),
    "masked": Case(lambda: randomised(Masked()), (1, 6), defective=True, residual=without_skip),
    "zero_branch": Case(lambda: zeroed(randomised(ZeroBranch()), "block.norm2.weight"), C3),
    "dead_units": Case(dead_units),
    "all_inactive": Case(all_inactive, C3, route="active"),
    "all_waist_inactive": Case(all_waist_inactive, C3),
    "wide_waist": Case(wide, (1, 2, 4, 4), route="active", branch="full"),
    "rms_norm": Case(lambda: randomised(RMS()), (1, 6), residual=without_skip),
    "spectral": Case(lambda: randomised(Spectral()), C3, route="full", branch="any", residual=without_skip),
    "pooled": Case(lambda: randomised(Pooled()), C3),
    "torchvision_basic": Case(lambda: torchvision_block("basic")),
    "torchvision_bottleneck": Case(lambda: torchvision_block("bottleneck"), C8, defective=True),
    "timm_basic": Case(lambda: timm_block("basic")),
    "timm_bottleneck": Case(lambda: timm_block("bottleneck"), C8, defective=True),
    "transformer_post_relu": Case(lambda: transformer(False, "relu"), (1, 4, 8), route="full", branch=None),
    "transformer_pre_relu": Case(lambda: transformer(True, "relu"), (1, 4, 8), "full", "full", residual=without_skip),
    "transformer_post_gelu": Case(lambda: transformer(False, "gelu"), (1, 4, 8), route="full", branch=None),
    "transformer_pre_gelu": Case(lambda: transformer(True, "gelu"), (1, 4, 8), "full", "full", residual=without_skip),
    "one": Case(lambda: lambda x: x + torch.tanh(3 * x), (1,), route="any", branch="any", residual=without_skip),
    "scalar": Case(lambda: torch.sin, (), route="full", branch=None),
    "identity": Case(lambda: lambda x: x, (1, 3), route="full", branch=None),
    "relu_alone": Case(lambda: torch.relu, (1, 6), route="active", branch=None),
    "constant": Case(lambda: lambda x: torch.ones(4, dtype=x.dtype), (4,), route="any", branch=None),
    "linear": Case(lambda: lambda x: x @ MATRIX.T, (5,), route="full", branch=None),
    "relu_at_zero": Case(
        lambda: randomised(Basic()), C3, point=lambda: seeded(C3, 1) * (seeded(C3, 2) > 0), route="any", branch="any"
    ),
    "all_at_zero": Case(
        lambda: lambda x: F.relu(F.relu(x) @ MATRIX.T + x),
        (5,),
        route="active",
        branch="any",
        point=lambda: torch.zeros(5, dtype=torch.float64),
    ),
    "mixed_precision": Case(
        lambda: lambda x: F.relu(x + F.relu(x.float() @ MATRIX[:2].T.float()) @ MATRIX[:, :2].T.float()), (5,), "any"
    ),
    "same_clamp": Case(
        lambda: lambda x: F.relu(torch.clamp(x @ MATRIX[:2].T, *[x.sum()] * 2) @ MATRIX[:, :2].T + x),
        (5,),
        "any",
        "any",
    ),
    "clamped_by_itself": Case(
        lambda: lambda x: clamped_by_itself(x @ MATRIX[:2].T) @ MATRIX[:, :2].T + x, (5,), residual=without_skip
    ),
    "batch_of_two": Case(lambda: randomised(Basic()), (2, 3, 3, 3), route="any"),
}


def clamped_by_itself(h):
    """An elementwise operation by name, yet of one tensor three times."""
    return torch.clamp(h, h, h)


class Projected(nn.Module):
    """relu(F(x) + a projection of x), rectangular: half the height and width, more channels."""

    def __init__(self, inside=2, outside=4):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(inside, outside, 3, 2, 1), nn.ReLU(), nn.Conv2d(outside, outside, 3, 1, 1))
        self.shortcut = nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x):
        return F.relu(self.f(x) + self.shortcut(x))
