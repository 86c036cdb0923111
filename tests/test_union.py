"""Spectra of block triangular Jacobians: the union of their diagonal blocks, from Python and in a run."""

import flint
import numpy as np
import pytest
import torch
from torch import nn

import stiffcore
from stiffcore.eigen import union
from stiffcore.errors import InputError
from stiffcore.verify import verify
from tests.sequences import GPTBlock, made

D, T = 8, 5


def point(t=T, d=D, seed=7):
    return torch.randn((1, t, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(f, x):
    """The diagonal blocks by tokens, (t, d, d), from the whole Jacobian."""
    t, d = x.shape[1:]
    j = torch.func.jacrev(f)(x).reshape(t, d, t, d)
    return torch.stack([j[i, :, i] for i in range(t)]).numpy()


def sorted_values(values):
    values = np.asarray(values, complex).ravel()
    return values[np.lexsort((values.imag.round(9), values.real.round(9)))]


@pytest.fixture(scope="module")
def gpt():
    f, x = made(GPTBlock, D, 2, "eager"), point()
    return f, x, stiffcore.spectrum(f, x)


def test_the_spectrum_of_a_causal_block_is_that_of_its_tokens(gpt):
    f, x, found = gpt
    blocks = blocks_of(f, x)
    assert found.certificate.passed
    assert found.n == found.k == T * D
    assert f"{T} components along axis 1" in found.reason
    np.testing.assert_allclose(sorted_values(found.values), sorted_values(np.linalg.eigvals(blocks)), atol=1e-11)
    for c in range(T):
        np.testing.assert_allclose(
            sorted_values(found.component(c)), sorted_values(np.linalg.eigvals(blocks[c])), atol=1e-11
        )


def test_metrics_of_each_token_are_those_of_its_block(gpt):
    f, x, found = gpt
    by_token = found.component_metrics()
    real = [np.linalg.eigvals(block).real for block in blocks_of(f, x)]
    np.testing.assert_array_equal(by_token["position"], np.arange(T))
    np.testing.assert_allclose(by_token["S"], [r.max() / r.min() for r in real], rtol=1e-9)
    np.testing.assert_allclose(by_token["abscissa"], [r.max() for r in real], rtol=1e-9)
    assert found.metrics["abscissa"] == by_token["abscissa"].max()
    assert found.negative_between == (0, 0)


def test_where_nothing_is_triangular_the_whole_is_solved_and_there_are_no_components():
    found = stiffcore.spectrum(made(GPTBlock, D, 2, "all"), point(3))
    assert found.components is None
    with pytest.raises(InputError, match="as a whole"):
        found.component(0)


def test_the_union_keeps_the_digits_that_the_whole_loses():
    """Tokens with a strong coupling to those before them: LAPACK on the whole is wrong where the blocks are right."""
    t, d = 6, 6
    generator = torch.Generator().manual_seed(3)
    own = torch.randn((t, d, d), generator=generator, dtype=torch.float64) / d**0.5
    past = 20 * torch.randn((d, d), generator=generator, dtype=torch.float64)
    before = torch.ones(t, t, dtype=torch.float64).tril(-1)

    def f(x):
        return torch.einsum("tij,btj->bti", own, x) + before @ x @ past

    x = point(t, d)
    found = stiffcore.spectrum(f, x, dtype="float64")
    with flint.ctx.workprec(300):
        exact = []
        for block in own.numpy():
            exact += [complex(z) for z in flint.acb_mat([[flint.acb(float(v)) for v in row] for row in block]).eig()]
    whole = torch.func.jacrev(f)(x).reshape(t * d, t * d).numpy()
    lapack = np.abs(sorted_values(np.linalg.eigvals(whole)) - sorted_values(exact)).max()
    ours = np.abs(sorted_values(found.values) - sorted_values(exact)).max()
    assert ours < 1e-13
    assert ours < found.certificate.error < 1e-11
    assert lapack > 1e3 * ours


class Small(nn.Module):
    """Two causal blocks on tokens of a floating input, and a readout."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([made(GPTBlock, D, 2, "eager"), made(GPTBlock, D, 2, "least", seed=1)])
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        for block in self.h:
            x = block(x)
        return self.head(x[:, -1])


def test_a_run_is_killed_between_components_and_goes_on(tmp_path, monkeypatch):
    network, x = made(Small), point(3)
    options = {"blocks": ["h.1"], "functions": ["branch"], "dtype": "float64", "memory": "4GiB"}
    solve, solved = union.solve_part, []

    def killed(reduction, chunk):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(reduction.jacobian.name)
        return solve(reduction, chunk)

    monkeypatch.setattr(union, "solve_part", killed)
    with pytest.raises(KeyboardInterrupt):
        stiffcore.analyze(network, x, run=tmp_path / "run", **options)
    monkeypatch.setattr(union, "solve_part", lambda r, c: solved.append(r.jacobian.name) or solve(r, c))
    run = stiffcore.analyze(network, x, run=tmp_path / "run", **options)
    assert len(solved) == len(set(solved)) == 3
    found = run.spectrum(0, "h.1", "branch")
    blocks = blocks_of(network.h[1], network.h[0](x)) - np.eye(D)
    np.testing.assert_allclose(sorted_values(found.values), sorted_values(np.linalg.eigvals(blocks)), atol=1e-11)
    assert len(found.components) == 3
    frame = run.metrics()
    assert set(frame["solver"]) == {"components"}
    assert frame["certified"].all()
    record = run.records()[run._key(0, "h.1", "branch", "matrix")]
    assert record.measured_bytes < record.plan.projected_bytes
    with pytest.raises(InputError, match="components"):
        run.count_left(0.5, 0, "h.1", "branch", module=network)
    checked = verify(run, certificates=True, module=network)
    assert not checked.findings
    assert checked.recomputed == 1


def test_a_run_that_keeps_all_has_no_matrix_that_would_be_missing(tmp_path):
    network, x = made(Small), point(3)
    options = {"blocks": ["h.1"], "functions": ["branch"], "memory": "4GiB", "keep": "all"}
    assert not verify(stiffcore.analyze(network, x, run=tmp_path / "run", **options)).findings
