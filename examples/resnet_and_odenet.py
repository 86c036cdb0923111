"""A ResNet and an ODENet with the same residual branch F: trajectories, and the spectrum of F along them.

A residual network x_{k+1} = x_k + h F(x_k) is explicit Euler for x' = F(x): h = 1 is the ResNet, h = 1/m has m times as
many layers, and the limit is the ODENet (Chen et al., Neural Ordinary Differential Equations, 2018; Fig. 2 of
"Block-level stiffness analysis of residual networks", whose own text was not at hand). F: R^2 -> R^2 is a small
network, untrained, and trained as the ResNet of five layers with shared weights to send an inner disc to the left and
the ring around it to the right. No ODE in the plane can do that, for its trajectories do not cross (Dupont et al.,
Augmented Neural ODEs, 2019): what the ResNet learns lives on its step of 1.

The eigenvalues l of F's Jacobian show it. Euler at step h follows the decaying part of x' = F(x) where |1 + h l| < 1:
the discs of h = 1 and h = 1/2 are drawn. `euler_stable` is the share within the first one, `stable_step` the largest
h that damps all l with Re l < 0.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torchdiffeq import odeint

import stiffcore

LAYERS = 5
STEPS = (1, 2, 8, 16)


def data(count):
    angle = 2 * torch.pi * torch.rand(count)
    inner = torch.arange(count) % 2 == 0
    radius = torch.where(inner, 0.6 * torch.rand(count).sqrt(), 1 + 0.4 * torch.rand(count))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), inner


def resnet(branch, x, m):
    """States of the ResNet with m layers in the place of each one, h = 1/m: (m LAYERS + 1, points, 2)."""
    states = [x]
    for _ in range(m * LAYERS):
        states.append(states[-1] + branch(states[-1]) / m)
    return torch.stack(states)


def trained(branch, steps):
    optimizer = torch.optim.Adam(branch.parameters(), lr=0.01)
    x, inner = data(400)
    goal = torch.where(inner[:, None], torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((resnet(branch, x, 1)[-1] - goal) ** 2).mean()
        loss.backward()
        optimizer.step()
    print(f"trained: mean square {loss.item():.3f}")
    return branch


def show(branch, name, points, left, right):
    branch.requires_grad_(False)
    x, inner = data(60)
    end = odeint(lambda t, y: branch(y), x, torch.linspace(0, LAYERS, 101), rtol=1e-9, atol=1e-9)
    print(f"\n{name}: distance of ResNet and ODENet at the end, mean over {len(x)} points")
    for m in STEPS:
        print(f"  h = 1/{m}: {(resnet(branch, x, m)[-1] - end[-1]).norm(dim=1).mean():.6f}")
    for number in range(12):
        colour = "tab:blue" if inner[number] else "tab:orange"
        left.plot(*end[:, number].T, color=colour, lw=1)
        left.plot(*resnet(branch, x, 1)[:, number].T, ".--", color=colour, lw=0.5)
        left.plot(*x[number], "ko", ms=3)
    left.set(title=f"{name}: ODENet (lines), ResNet at h = 1 (dots)", xlabel="x1", ylabel="x2")
    for time in range(LAYERS + 1):
        found = [spectrum(branch, point) for point in end[20 * time, :points]]
        values = np.concatenate([s.values for s in found])
        right.plot(values.real, values.imag, "o", ms=4, color=plt.cm.viridis(time / LAYERS), label=f"t = {time}")
        inside = np.mean([s.metrics["euler_stable"] for s in found])
        step = min(s.metrics["stable_step"] for s in found)
        verdicts = ", ".join(sorted({s.verdict for s in found}))
        print(f"  t = {time}: Re from {values.real.min():.2f} to {values.real.max():.2f},", end=" ")
        print(f"euler_stable {inside:.2f}, stable_step {step:.3g} ({verdicts})")
    for h, style in ((1, "-"), (0.5, "--")):
        right.add_patch(plt.Circle((-1 / h, 0), 1 / h, fill=False, ls=style))
    right.axvline(0, color="0.8", lw=0.5)
    right.set(title="eigenvalues of F along the ODENet", xlabel="Re l", ylabel="Im l", aspect="equal")
    right.legend(fontsize="small")


def spectrum(branch, x):
    return stiffcore.spectrum(lambda y: y + branch(y), x, function="branch", name="F")


def main(to, quick):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    untrained = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    points = 1 if quick else 4
    show(untrained, "untrained", points, *axes[0])
    show(trained(untrained.requires_grad_(True), 200 if quick else 1500), "trained", points, *axes[1])
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="resnet_and_odenet.png", help="the picture")
    parser.add_argument("--quick", action="store_true", help="train for 200 steps, not 1500; spectra of one trajectory")
    main(**vars(parser.parse_args()))
