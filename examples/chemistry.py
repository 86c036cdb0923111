"""Two stiff kinetics, ROBER and POLLU: eigenvalues of the Jacobian along the solution, and the stiffness ratio.

ROBER: 3 species, 3 reactions, t from 0 to 1e11 (Robertson 1966). POLLU: 20 species, 25 reactions of air pollution, an
hour (Verwer, Gauss-Seidel iteration for stiff ODEs from chemical kinetics, SIAM J. Sci. Comput. 15 (1994)). Both are
problems of the Test Set for IVP Solvers (Mazzia & Magherini, University of Bari), whose reference solutions are
compared. Mass action: a reaction's rate r is k times the concentrations on its left; y' = N r, N the net stoichiometry.

What mass action conserves gives eigenvalue 0: y1 + y2 + y3 in ROBER. POLLU has four zeros: nothing consumes CO, CO2,
HNO3 and SO4, and its three conservation laws lie in the same left null space. An eigenvalue 0 may be computed as
rounding of either sign. The certificate says which signs to trust: "unsure" counts the eigenvalues within its
`axis_error` of the axis, and `decay_ratio`, max |Re| / min |Re| over Re < 0 (Lambert, Numerical Methods for Ordinary
Differential Systems, 1991, section 6.2), leaves them out. It is a lower bound: beside an eigenvalue of 4e11, POLLU's
slowest species are unsure too.
"""

import argparse
import re

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import null_space

import stiffcore

ROBER = {"A -> B": 0.04, "B + B -> C + B": 3e7, "B + C -> A + C": 1e4}
POLLU = {
    "NO2 -> NO + O3P": 0.35,
    "NO + O3 -> NO2": 26.6,
    "HO2 + NO -> NO2 + OH": 1.23e4,
    "HCHO -> HO2 + HO2 + CO": 8.6e-4,
    "HCHO -> CO": 8.2e-4,
    "HCHO + OH -> HO2 + CO": 1.5e4,
    "ALD -> MEO2 + HO2 + CO": 1.3e-4,
    "ALD + OH -> C2O3": 2.4e4,
    "C2O3 + NO -> NO2 + MEO2 + CO2": 1.65e4,
    "C2O3 + NO2 -> PAN": 9e3,
    "PAN -> C2O3 + NO2": 0.022,
    "MEO2 + NO -> CH3O + NO2": 1.2e4,
    "CH3O -> HCHO + HO2": 1.88,
    "NO2 + OH -> HNO3": 1.63e4,
    "O3P -> O3": 4.8e6,
    "O3 -> O1D": 3.5e-4,
    "O3 -> O3P": 0.0175,
    "O1D -> OH + OH": 1e8,
    "O1D -> O3P": 4.44e11,
    "SO2 + OH -> SO4 + HO2": 1240,
    "NO3 -> NO": 2.1,
    "NO3 -> NO2 + O3P": 5.78,
    "NO2 + O3 -> NO3": 0.0474,
    "NO3 + NO2 -> N2O5": 1780,
    "N2O5 -> NO3 + NO2": 3.12,
}
START = {"NO": 0.2, "O3": 0.04, "HCHO": 0.1, "CO": 0.3, "ALD": 0.01, "SO2": 0.007, "A": 1.0}
# test set: y1, y2, y3 at the end
REFERENCE = {
    "ROBER": [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050],
    "POLLU": [0.5646255480022769e-01, 0.1342484130422339, 0.4139734331099427e-08],
}


def kinetics(reactions):
    """The right-hand side y' = f(y) as a torch function, N (species x reactions), and y(0); species as they appear."""
    names = list(dict.fromkeys(re.findall(r"\w+", " ".join(reactions))))
    left, net = [], np.zeros((len(names), len(reactions)))
    for j, equation in enumerate(reactions):
        used, made = ([names.index(name) for name in re.findall(r"\w+", side)] for side in equation.split("->"))
        np.add.at(net[:, j], used, -1)
        np.add.at(net[:, j], made, 1)
        left.append([*used, len(names)][:2])  # a lone reactant meets the 1 that is appended to y
    n, k, left = torch.from_numpy(net), torch.tensor(list(reactions.values()), dtype=torch.float64), torch.tensor(left)

    def f(y):
        z = torch.cat([y, y.new_ones(1)])
        return n @ (k * z[left[:, 0]] * z[left[:, 1]])

    return f, net, np.array([START.get(name, 0.0) for name in names])


def study(name, reactions, times, axes):
    f, net, start = kinetics(reactions)
    jacobian = torch.func.jacfwd(f)
    solution = solve_ivp(
        lambda t, y: f(torch.from_numpy(y)).numpy(),
        (0, times[-1]),
        start,
        "Radau",
        times,
        rtol=1e-7,
        atol=1e-18,
        jac=lambda t, y: jacobian(torch.from_numpy(y)).numpy(),
    )
    off = np.abs(solution.y[:3, -1] / REFERENCE[name] - 1).max()
    laws = null_space(net.T)
    drift = np.abs(laws.T @ (solution.y[:, -1] - start)).max()
    print(f"\n{name}: reference met to {off:.1e}; {laws.shape[1]} conservation laws, kept to {drift:.1e}")
    print("y1, y2, y3 at the end:", *(f"{value:.10e}" for value in solution.y[:3, -1]))
    print(f"{'t':>9} {'fastest':>10} {'unsure':>6} {'decay_ratio':>11}  verdict")
    for t, y in zip(times, solution.y.T, strict=True):
        s = stiffcore.spectrum(f, torch.from_numpy(y), name=f"{name} at t = {t:.3g}")
        sure = np.abs(s.values.real) > s.certificate.axis_error
        ratio = s.metrics["decay_ratio"]
        print(f"{t:9.3g} {s.values.real[0]:10.3g} {np.sum(~sure):6} {ratio:11.3g}  {s.verdict}")
        axes[0].loglog(np.full(s.n, t), np.where(sure, np.abs(s.values), np.nan), "k.", ms=3)
        axes[0].loglog(np.full(s.n, t), np.where(sure, np.nan, np.abs(s.values)), "x", color="0.7", ms=3)
        axes[1].loglog(t, ratio, ".", color="tab:red")
    axes[0].set(title=f"{name}: |eigenvalues| (grey: sign unsure)")
    axes[1].set(xlabel="t", title="stiffness ratio of those whose sign is sure")


def main(to, quick):
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex="col")
    points = 6 if quick else 30
    study("ROBER", ROBER, np.logspace(-5, 11, points), axes[:, 0])
    study("POLLU", POLLU, np.append(np.logspace(-6, 1.7, points - 1), 60), axes[:, 1])
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="chemistry.png", help="the picture")
    parser.add_argument("--quick", action="store_true", help="six points of each solution")
    main(**vars(parser.parse_args()))
