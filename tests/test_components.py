"""Block triangular Jacobians: the components found, and their diagonal blocks, against the whole Jacobian."""

import numpy as np
import pytest
import torch
from torch import nn

from stiffcore.jacobian.components import find_components
from tests.sequences import (
    GRU,
    CausalConvolution,
    CellOverTime,
    Coupling,
    GPTBlock,
    LlamaBlock,
    Masked,
    MaskedEncoder,
    made,
)

D, T = 8, 4
CAUSAL = {
    "gpt, sdpa": lambda: made(GPTBlock, D, 2),
    "gpt, eager": lambda: made(GPTBlock, D, 2, "eager"),
    "gpt, eager with the least number": lambda: made(GPTBlock, D, 2, "least"),
    "two blocks": lambda: nn.Sequential(made(GPTBlock, D, 2), made(GPTBlock, D, 2, "eager", seed=1)),
    "llama": lambda: made(LlamaBlock, D, 2, 1),
    "encoder": lambda: made(MaskedEncoder, D, 2),
    "gru": lambda: made(GRU, D),
    "cell": lambda: made(CellOverTime, D),
    "convolution": lambda: made(CausalConvolution, D),
}


def point(t=T, d=D):
    return torch.randn((1, t, d), generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def jacobian(f, x):
    return torch.func.jacrev(f)(x).reshape(x.numel(), -1).numpy()


def places(components, c):
    x = components.jacobian.x
    return np.take(np.arange(x.numel()).reshape(x.shape), components.members[c], axis=components.axis).ravel()


@pytest.mark.parametrize("name", CAUSAL)
def test_each_token_is_a_component_and_its_block_needs_no_other_token(name):
    f, x = CAUSAL[name](), point()
    found, leak = find_components(f, x)
    assert leak == ""
    assert found.axis == 1
    assert [m.tolist() for m in found.members] == [[i] for i in range(T)]
    assert found.positions is not None
    j = jacobian(f, x)
    for c in range(T):
        at = places(found, c)
        block = torch.func.jacfwd(found.function(c))(found.point(c)).reshape(D, D).numpy()
        np.testing.assert_allclose(block, j[np.ix_(at, at)], atol=1e-14)
    reduction = found.reduction(T - 1)
    assert reduction.check < 1e-13
    np.testing.assert_allclose(
        np.sort_complex(np.linalg.eigvals(reduction.columns(0, reduction.k).numpy()) + reduction.shift),
        np.sort_complex(np.linalg.eigvals(block)),
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", [Coupling, Masked])
def test_features_of_a_flow_are_components_in_their_own_order(kind):
    f, x = made(kind, D), point()
    found, _ = find_components(f, x)
    assert found.axis == 2
    assert sorted(int(m[0]) for m in found.members) == list(range(D))
    j = jacobian(f, x)
    order = np.concatenate([places(found, c) for c in range(D)])
    blocks = np.arange(D).repeat(T)
    above = blocks[:, None] < blocks[None]
    assert not j[np.ix_(order, order)][above].any()
    for c in range(D):
        at = places(found, c)
        block = torch.func.jacfwd(found.function(c))(found.point(c)).reshape(T, T).numpy()
        np.testing.assert_allclose(block, j[np.ix_(at, at)], atol=1e-14)


def test_parts_that_depend_on_each_other_are_one_component():
    """Tokens in chunks of three that see each other: block triangular by chunks, not by tokens."""
    mask = torch.ones(2, 2).tril().repeat_interleave(3, 0).repeat_interleave(3, 1).double()
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * mask

    def f(x):
        return x + torch.tanh(mix @ x)

    found, _ = find_components(f, point(6, 2), axis=1)
    assert [m.tolist() for m in found.members] == [[0, 1, 2], [3, 4, 5]]
    assert found.reduction(0).n == 6


def test_a_leak_is_no_zero_and_is_told():
    found, leak = find_components(made(GPTBlock, D, 2, "soft"), point())
    assert found is None
    assert "axis 1" in leak
    assert "not zero" in leak


@pytest.mark.parametrize("kind", ["all", "ahead"])
def test_where_nothing_is_triangular_there_are_no_components(kind):
    f = made(GPTBlock, D, 2, "all") if kind == "all" else made(CausalConvolution, D, ahead=1)
    assert find_components(f, point()) == (None, "")


def test_of_a_long_sequence_every_part_is_looked_at():
    f, x = made(GPTBlock, 4, 2), point(80, 4)
    found, _ = find_components(f, x)
    assert len(found) == len(found.products) == 80
    j = jacobian(f, x)
    for c in (0, 41, 79):
        block = torch.func.jacfwd(found.function(c))(found.point(c)).reshape(4, 4).numpy()
        np.testing.assert_allclose(block, j[4 * c : 4 * c + 4, 4 * c : 4 * c + 4], atol=1e-13)

    def leaking(x):
        out = f(x)
        return out + torch.nn.functional.pad(1e-9 * x[:, 52:53], (0, 0, 51, 28))  # token 51 sees token 52

    joined, _ = find_components(leaking, x)
    assert joined is None or {51, 52} <= set(next(m.tolist() for m in joined.members if 51 in m))


def test_of_a_long_sequence_chunks_that_see_each_other_are_no_tokens():
    size = 4
    mask = torch.ones(80 // size, 80 // size).tril().repeat_interleave(size, 0).repeat_interleave(size, 1).double()
    mix = torch.randn(80, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * mask
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def f(x):
        return x + mix @ x @ turn

    found, _ = find_components(f, point(80, 3))
    assert found is None or all(len(m) == size for m in found.members)


def test_what_is_hidden_from_autograd_is_in_no_block():
    """The graph has no detach, J has: the position alone is not used, however long the sequence is."""
    block = made(GPTBlock, 4, 2, "eager")

    def f(x):
        return block(x) + torch.tanh(x).detach() * x

    x = point(70, 4)
    found, _ = find_components(f, x)
    assert found.positions is None
    assert len(found.products) == 70
    z = torch.func.jacfwd(found.function(33))(found.point(33)).reshape(4, 4).numpy()
    np.testing.assert_allclose(z, jacobian(f, x)[132:136, 132:136], atol=1e-13)
