"""A stiff linear ODE, explicit Euler just under and just over its stable step, and where its spectrum says that is.

x' = A x with A = [[998, 1998], [-999, -1999]] and x(0) = (1, 0) has the eigenvalues -1 and -1000, and the solution
x1 = 2 exp(-t) - exp(-1000 t), x2 = -exp(-t) + exp(-1000 t): a fast part that is gone after 0.01, and a slow one that
lasts. This is the textbook's system (Press et al., Numerical Recipes, section "Stiff Sets of Equations"). Eq. 8-9 and
Fig. 3 of "Block-level stiffness analysis of residual networks" make the same point; the paper's own text was not at
hand, so its numbers may be others. Explicit Euler, x + h A x, damps the part of an eigenvalue l where |1 + h l| < 1
(Hairer & Wanner, Solving Ordinary Differential Equations II, section IV.2).

`stable_step` has a meaning for a right-hand side alone, so stiffcore gives it for `function="branch"`: the part F of
x + F(x). For a plain right-hand side f, ask for the branch of x + f(x), which is one step of Euler at h = 1.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch

import stiffcore

A = np.array([[998.0, 1998.0], [-999.0, -1999.0]])
START = np.array([1.0, 0.0])
END = 0.2


def exact(t):
    slow, fast = np.exp(-t), np.exp(-1000 * t)
    return np.stack([2 * slow - fast, -slow + fast], axis=-1)


def euler(h):
    states = [START]
    for _ in range(round(END / h)):
        states.append(states[-1] + h * A @ states[-1])
    return h * np.arange(len(states)), np.array(states)


def main(to):
    matrix = torch.from_numpy(A)
    s = stiffcore.spectrum(lambda x: x + matrix @ x, torch.from_numpy(START), function="branch", name="x' = A x")
    limit = s.metrics["stable_step"]
    print("eigenvalues:", ", ".join(f"{value:.6f}" for value in s.values.real), f"({s.verdict})")
    print(f"decay_ratio: {s.metrics['decay_ratio']:.6f}   S of Eq. 10: {s.metrics['S']:.6f}")
    print(f"stable_step: {limit:.9f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    disc = plt.Circle((-1, 0), 1, color="0.9", label="stable: |1 + h l| < 1")
    right.add_patch(disc)
    for share, colour in ((0.99, "tab:blue"), (1.01, "tab:red")):
        h = share * limit
        t, x = euler(h)
        error = np.abs(x - exact(t)).max(axis=1)
        print(f"h = {h:.5f}: error {error[1]:.3g} after one step, {error[-1]:.3g} at t = {t[-1]:.3f}")
        left.plot(t, x[:, 0], ".-", color=colour, lw=0.6, ms=3, label=f"Euler, h = {h:.5f}")
        right.plot(h * s.values.real, h * s.values.imag, "o", color=colour, label=f"h l at h = {h:.5f}")
    t = np.linspace(0, END, 2001)
    left.plot(t, exact(t)[:, 0], "k", lw=1.2, label="exact")
    left.set(xlabel="t", ylabel="x1", title="explicit Euler on either side of the stable step")
    right.axhline(0, color="0.6", lw=0.5)
    right.set(xlabel="Re h l", ylabel="Im h l", title="eigenvalues times h", xlim=(-2.2, 0.2), aspect="equal")
    for axes in (left, right):
        axes.legend(loc="upper right")
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="stiff_ode.png", help="the picture")
    main(parser.parse_args().to)
