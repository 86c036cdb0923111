"""Which way of differentiation a function allows: products are checked against each other, and against its values.

J is what torch's autograd says: what a function hides from it (`detach`, straight-through rounding) has no part in J.
Forward and reverse mode of `torch.func` are taken where both work and agree. Otherwise reverse products come from plain
autograd, which knows more (old `autograd.Function`, checkpoints, hooks, operations without a forward derivative), and
forward products from the first of these that agrees with them: the derivative of u -> J^T u, which is J; the function's
graph; or J itself, held in memory. Reverse and forward products are no longer found independently then. So they are
compared with difference quotients of the function's values, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stiffcore.errors import InputError, StiffcoreError
from stiffcore.jacobian.graph import FunctionGraph
from stiffcore.jacobian.linearise import Linearisation, Way
from stiffcore.jacobian.modules import Untouched
from stiffcore.jacobian.rounding import BEYOND, length, noise_of, tangents, with_sums

# What forward and reverse products may differ by, in their size, whatever their noise: solving by factors that are
# rounded is linear and has no noise, yet rounds otherwise for the transpose.
ADJOINT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
# What rounding leaves of linearity in plain autograd's products, even in half precision.
LINEAR = 0.02
# Steps of difference quotients, relative to the largest number of x (or 1); how many combinations of the numbers of the
# result are compared; what the best step may miss by.
STEPS = {torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7), torch.float32: (1e-1, 1e-2, 1e-3)}
DIRECTIONS = 4
VALUE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}


def differentiate(jacobian: Linearisation, graph: FunctionGraph | None) -> None:
    """Give a linearisation the first way to products that passes its checks, and note which where it is not the usual.

    Args:
        jacobian: as it was made.
        graph: of its function; None: there is none.

    Raises:
        InputError: where no way passes.
    """
    try:
        check_derivatives(jacobian)
        return
    except InputError as error:
        usual = error
    contradicted = usual.__cause__ is None
    for way in (Way.TWICE, Way.TRACE, Way.ROWS):
        if way is Way.TRACE and graph is None:
            continue
        function = graph.between(graph.input, [graph.output]) if graph is not None and way is Way.TRACE else None
        jacobian.take(way, function)
        try:
            (_check_reverse if way is Way.ROWS else check_derivatives)(jacobian)
            gap = value_gap(jacobian)
        except InputError:
            continue
        true = gap <= VALUE_TOLERANCE[jacobian.x.dtype]
        if contradicted and not true:
            break
        note = f"derivatives by {way}"
        if not true:
            note += f", as autograd has them: its values change by something else ({gap:.0e})"
        jacobian.notes.append(note)
        return
    jacobian.take(Way.TRANSFORMS)
    raise usual


def check_derivatives(jacobian: Linearisation) -> None:
    """Compare C (J T^T) with (C J) T^T, for a few random rows C and T, by their rounding.

    Raises:
        InputError: where these disagree, or are not finite.
    """
    x = jacobian.x
    inside, outside = with_sums(tangents(x, jacobian.n, 2)), with_sums(tangents(x, jacobian.m, 2, seed=1))
    with derivatives_of(jacobian):
        if jacobian.way is Way.TRANSFORMS and isinstance(jacobian.f, Untouched) and jacobian.f.replaces:
            raise RuntimeError("it replaces the data of its parameters")
        forward, reverse = jacobian.jvp(inside).double(), jacobian.vjp(outside).double()
    if not bool(torch.isfinite(forward).all() and torch.isfinite(reverse).all()):
        raise InputError(f"{jacobian.name}: its derivative at this input is not finite")
    if jacobian.way is not Way.TRANSFORMS and not length(noise_of(reverse)) <= LINEAR * length(reverse):
        raise InputError(f"{jacobian.name}: its reverse derivatives are not linear")
    a, b = outside.double() @ forward.T, reverse @ inside.double().T
    gap, noise = length((a - b).reshape(-1, 1)), length(noise_of(forward)) + length(noise_of(reverse))
    # the rounding of entries, of which a number a or b is a random sum
    noise += torch.finfo(x.dtype).eps * (length(forward) + length(reverse))
    relative = gap / max(length(a.reshape(-1, 1)), length(b.reshape(-1, 1)), 1e-300)
    if not (gap <= BEYOND * noise or relative <= ADJOINT_TOLERANCE[x.dtype]):
        raise InputError(
            f"{jacobian.name}: its forward and reverse derivatives disagree (by {relative:.1e}): is there a "
            "torch.no_grad() inside, a custom autograd.Function with a wrong jvp, a hook, or low precision?"
        )


def _check_reverse(jacobian: Linearisation) -> None:
    """Refuse reverse products that are not finite, or not linear: all else follows from them.

    Raises:
        InputError: where they are not.
    """
    rows = with_sums(tangents(jacobian.x, jacobian.m, 2, seed=1))
    with derivatives_of(jacobian):
        found = jacobian.vjp(rows).double()
        again = jacobian.vjp(rows[:1]).double()  # one alone
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{jacobian.name}: its derivative at this input is not finite")
    eps, most = torch.finfo(jacobian.x.dtype).eps, float(found.abs().max())
    lack = max(float(noise_of(found).max()), float((found[:1] - again).abs().max()))
    if not lack <= eps**0.5 * most:
        raise InputError(f"{jacobian.name}: its reverse derivatives are not linear (by {lack / most:.1e})")


def value_gap(jacobian: Linearisation) -> float:
    """How far u J t is from u (f(x + h t) - f(x - h t)) / 2 h, for a few random u and t, relative to it.

    Returns:
        The least over steps h: 0 where both are 0, inf where the function has no values there.
    """
    x = jacobian.x
    inside, outside = tangents(x, jacobian.n, 2), tangents(x, jacobian.m, DIRECTIONS, seed=1)
    with derivatives_of(jacobian):
        expected = jacobian.vjp(outside).double() @ inside.double().T
    best, size = float("inf"), float(x.abs().max().clamp_min(1.0))
    for step in STEPS[x.dtype]:
        h = step * size
        columns = []
        for t in inside:
            try:
                ends = [jacobian.evaluate(x + sign * h * t.reshape(x.shape)).double() for sign in (1, -1)]
            except Exception:  # outside of where the function is defined
                break
            columns.append(((ends[0] - ends[1]) / (2 * h)).reshape(-1))
        if len(columns) < len(inside):
            continue
        found = outside.double() @ torch.stack(columns).T
        scale = max(float(found.norm()), float(expected.norm()))
        gap = float((found - expected).norm())
        best = min(best, gap / scale if scale else 0.0)
    return best


@contextmanager
def derivatives_of(jacobian: Linearisation) -> Iterator[None]:
    """Turn what a function raises while it is differentiated into an error for people.

    Raises:
        InputError: from whatever it raised, memory and our own errors excepted.
    """
    try:
        yield
    except (StiffcoreError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a function's own operations may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{jacobian.name} cannot be differentiated: {reason}") from error
