"""Claims about what is measured of rounding, and of what a graph lacks, against exact products and dense Jacobians."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flint import fmpq, fmpq_mat

from stiffcore.errors import InputError
from stiffcore.jacobian.factors import open_factors
from stiffcore.jacobian.reduction import Route, reduce_jacobian
from tests.cases import CASES, seeded
from tests.reference import dense_jacobian

N, K = 40, 10
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def rational(a):
    """The numbers of an array as they are, as fractions."""
    return fmpq_mat(*a.shape, [fmpq(*map(int, float(v).as_integer_ratio())) for v in a.ravel()])


def cancelling(size, k=24, n=48):
    """V and U with a product of norm 1; what cancels in it is `size` times larger."""
    v, noise = seeded((k, n), 1).numpy() / n**0.5, seeded((n, k), 2).numpy()
    inverse = np.linalg.pinv(v)
    return v, inverse @ seeded((k, k), 3).numpy() / k**0.5 + size * (noise - inverse @ (v @ noise))


def matrix(r):
    return r.columns(0, r.k).double().numpy()


@BOTH
@pytest.mark.parametrize("size", [1.0, 2.0**6, 2.0**14])
def test_the_rounding_of_a_product_covers_its_distance_from_the_exact_one(size, dtype):
    a, b = (torch.from_numpy(m).to(dtype) for m in cancelling(size))
    r = reduce_jacobian(lambda x: x + b @ F.relu(a @ x + 100), torch.zeros(48, dtype=dtype))
    assert r.route is Route.WAIST
    gap = rational(matrix(r)) - rational(a.double().numpy()) * rational(b.double().numpy())
    true = np.linalg.norm([float(e.p) / float(e.q) for e in gap.entries()])
    assert true / 4 <= r.rounding <= 50 * true
    assert true >= torch.finfo(dtype).eps * size / 2


@pytest.mark.parametrize("name", ["basic", "gelu_after", "transformer_post_gelu", "group_norm", "squeeze_excite"])
def test_the_rounding_of_a_single_precision_run_covers_its_distance_from_the_double_one(name):
    f, x = CASES[name].open()
    narrow, x = deepcopy(f).float(), x.float()
    wide = dense_jacobian(deepcopy(narrow).double(), x.double())
    r = reduce_jacobian(narrow, x, reduce=False)
    true = np.linalg.norm(matrix(r) - wide[r.index][:, r.index], 2)
    assert true <= r.rounding <= 200 * true
    assert r.exact.jacobian.x.dtype == torch.float64
    assert np.allclose(matrix(r.exact), wide[r.index][:, r.index], atol=1e-12)


@BOTH
def test_low_precision_inside_is_rounding_too(dtype):
    w = seeded((N, N), 1, dtype) / N**0.5

    def f(x):
        return (w.bfloat16() @ torch.tanh(x).bfloat16()).to(dtype) + x

    r = reduce_jacobian(f, seeded((N,), 2, dtype))
    true = dense_jacobian(lambda x: w.double() @ torch.tanh(x) + x, seeded((N,), 2, dtype).double())
    gap = np.linalg.norm(matrix(r) - true[r.index][:, r.index], 2)
    assert 1e-3 < gap <= r.rounding <= 50 * gap


@pytest.mark.parametrize("power", [-480, -100, 100, 480])
def test_rounding_scales_as_the_function_does(power):
    w = seeded((N, N), 1)
    of = [reduce_jacobian(lambda x, w=w * 2.0**p: w @ torch.tanh(x), seeded((N,), 2)).rounding for p in (0, power)]
    assert of[0] / 8 <= of[1] / 2.0**power <= 8 * of[0]


def parts(dtype, k=K):
    return [seeded(shape, i, dtype) / N**0.5 for i, shape in enumerate([(k, N), (N, k), (N, k)])]


@BOTH
@pytest.mark.parametrize("weight", [4e-2, 4e-4, 2.0**-16])
def test_a_detached_part_of_small_weight_is_no_part_of_the_matrix(dtype, weight):
    into, out, hidden = parts(dtype)

    def f(x):
        h = torch.relu(into @ x)
        return torch.relu(x + out @ h + weight * (hidden @ h).detach())

    x = seeded((N,), 9, dtype)
    r = reduce_jacobian(f, x)
    true = np.linalg.eigvals(dense_jacobian(f, x))
    found = np.concatenate([r.shift + np.linalg.eigvals(matrix(r)), np.ones(r.ones), np.zeros(r.zeros)])
    assert r.route is not Route.WAIST
    assert r.accumulation is None
    assert np.abs(np.sort_complex(found) - np.sort_complex(true)).max() <= 100 * torch.finfo(dtype).eps


@BOTH
def test_straight_through_rounding_is_differentiated_as_autograd_does(dtype):
    into, out, _ = parts(dtype)

    def f(x):
        h = into @ x
        return x + out @ (h + (torch.round(h * 256) / 256 - h).detach())

    r = reduce_jacobian(f, seeded((N,), 9, dtype))
    whole = np.eye(N) + (out.double() @ into.double()).numpy()
    assert r.route is Route.FULL
    assert np.allclose(matrix(r), whole, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_lost_of_a_part_far_smaller_than_the_rest_is_seen(transposed):
    """Of the small part it is all; of the whole, 1e-16: rows, or columns, are to be compared at their own size."""
    into, out, hidden = parts(torch.float64)
    sizes = torch.cat([torch.full((N // 2,), 2.0**50), torch.ones(N // 2)]).double()
    rows, columns = (1 / sizes, sizes) if transposed else (sizes, 1 / sizes)

    def f(x):
        h = torch.relu(into @ (x * columns))
        return rows * (out @ h) + rows * (1e-3 * hidden @ h).detach()

    r = reduce_jacobian(f, seeded((N,), 9))
    assert r.route is not Route.WAIST or r.loss > 0


@BOTH
def test_a_derivative_that_is_zero_up_to_rounding_is_no_disagreement(dtype):
    first, second = seeded((N, K), 1, dtype), seeded((K, N), 2, dtype)
    product = first @ second

    def f(x):
        return first @ (second @ x) - product @ x

    r = reduce_jacobian(f, seeded((N,), 3, dtype))
    assert np.linalg.norm(matrix(r), 2) <= r.rounding <= 1e4 * torch.finfo(dtype).eps


def test_a_wrong_derivative_is_a_disagreement_still():
    class Wrong(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g * (2 + 1e-3)

        @staticmethod
        def jvp(ctx, t):
            return t * 2

    with pytest.raises(InputError, match="disagree"):
        reduce_jacobian(Wrong.apply, seeded((N,), 3))


def test_a_function_with_default_arguments_is_traced():
    into, out, _ = parts(torch.float64)

    def f(x, scale=2.0, shift=None, *, more=0.0):
        assert (shift, more) == (None, 0.0)
        return x + scale * (out @ torch.relu(into @ x))

    assert reduce_jacobian(f, seeded((N,), 9)).route is Route.WAIST


def test_the_rounding_of_a_rectangular_jacobian_is_measured():
    w = seeded((7, N), 1, torch.float32)

    def f(x):
        return w @ torch.tanh(x)

    factors = open_factors(f, seeded((N,), 2, torch.float32))
    products = factors.jacobian.jvp(torch.eye(N)).T.double().numpy()
    x = seeded((N,), 2, torch.float32).double()
    true = w.double().numpy() * (1 - torch.tanh(x).numpy() ** 2)
    gap = np.linalg.norm(products - true, 2)
    assert gap <= factors.rounding <= 50 * gap
