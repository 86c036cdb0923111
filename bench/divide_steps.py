"""Which iteration finds the sign of a matrix in panels at the least cost: Newton's, Newton-Schulz or Halley's?

LU, inverse and product of a random matrix of order 3,072 (`--quick`: 1,024) in a store, in blocks of 768 columns, on
one thread (seconds of the processor). A step of Newton's is an LU and an inverse; of Newton-Schulz, X (3 I - X^2) / 2,
two products; of Halley's, X / 3 + 8/3 (I + 3 X^2)^-1 X, a product, an LU, and a solve that takes as long as an inverse.
Near the sign, a step of the first two doubles the digits, one of Halley's trebles them: seconds for a doubling are
those of a step by log2 of that. Newton-Schulz converges only where |X^2 - I| < 1, the other two from everywhere.
"""

import math
import tempfile

import numpy as np
from common import QUICK, cpu_seconds, product_rate, stored, workspace, write
from threadpoolctl import threadpool_limits

from stiffcore.eigen import panels

N, PANEL, AT_ONCE = 1024 if QUICK else 3072, 256, 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        space, rng = workspace(folder, PANEL), np.random.default_rng(0)
        a = stored(space, "a", lambda start, stop: rng.standard_normal((N, stop - start)), N)
        lu, inverse, square = (space.matrix(name, N + (name == "lu"), N) for name in ("lu", "inverse", "square"))
        kernels = {
            "LU": lambda: panels.factor(a, lu, at_once=AT_ONCE),
            "inverse": lambda: panels.inverse(lu, inverse, at_once=AT_ONCE),
            # a product halves its blocks, for it holds two
            "product": lambda: panels.product(a, a, square, at_once=2 * AT_ONCE),
        }
        seconds = {name: cpu_seconds(kernel)[1] for name, kernel in kernels.items()}
        rate = product_rate()
    newton = seconds["LU"] + seconds["inverse"]
    steps = {"Newton": newton, "Newton-Schulz": 2 * seconds["product"], "Halley": seconds["product"] + newton}
    rows = [
        {"iteration": name, "step_s": s, "doubling_s": s / (math.log2(3) if name == "Halley" else 1)}
        for name, s in steps.items()
    ]
    operations = {"LU": 2 / 3 * N**3, "inverse": 2 * N**3, "product": 2 * N**3}
    shares = {name: operations[name] / s / rate for name, s in seconds.items()}
    write(__file__, {"order": N, "seconds": seconds, "share_of_product_rate": shares, "steps": rows})
