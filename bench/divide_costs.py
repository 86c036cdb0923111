"""What would all eigenvalues of ResNet50's square blocks at 224 x 224 cost, by division, on machines large and small?

On paper, from measured rates: orders k from imagenet_plan.json; operations in k^3, the share of the product rate and
the bytes moved in units of those planned, as divide.json has them of a real division; rates of this machine from
rates.json and of one GPU from rates-cuda.json. The bytes planned are `divide_moved_bytes` of `stiffcore.solvers.divide`
for blocks as wide as memory holds: 12 GiB here, 72 GB of one GPU with 80, and eight times that where eight of them hold
one block together. They are moved at the disk's rate (the slower of reading and writing): here as measured, beside a
GPU 6 GB/s, which is assumed of one NVMe drive (the disk of the lent machine reached a sixth of it), and eight drives
beside eight GPUs. A run takes the sum of both times, as it is built; reading ahead would leave the larger one. No GPU
has run a division yet: the share is taken to be the same there.
"""

import json

from common import RESULTS, write

from stiffcore.solvers.divide import divide_moved_bytes, divide_sizes

BLOCKS = ("layer3.1", "layer2.1", "layer1.2")
NVME = 6e9


def recorded(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]


if __name__ == "__main__":
    orders = {unit["block"]: unit["k"] for unit in recorded("imagenet_plan")["units"]}
    here, gpu, solve = recorded("rates"), recorded("rates-cuda"), recorded("divide")["divided"]
    share = solve["share_of_product_rate"]
    more = (solve["read_bytes"] + solve["written_bytes"]) / solve["planned_moved_bytes"]
    cubes = solve["operations"] / recorded("divide")["k"] ** 3
    disk = min(here["bytes_per_s"]["disk_read"], here["bytes_per_s"]["disk_write"])
    machines = {
        "this machine": (12 << 30, here["flops_per_s"]["product"], disk),
        "one GPU of 80 GB": (72_000_000_000, gpu["flops_per_s"]["product"], NVME),
        "eight of them": (8 * 72_000_000_000, 8 * gpu["flops_per_s"]["product"], 8 * NVME),
    }
    rows = []
    for block in BLOCKS:
        k = orders[block]
        for name, (memory, rate, bytes_per_s) in machines.items():
            width, at_once, _ = divide_sizes(k, memory)
            moved = more * divide_moved_bytes(k, width * at_once)
            row = {"block": block, "k": k, "matrix_bytes": 8 * k * k, "machine": name, "columns": width * at_once}
            row |= {"operations": cubes * k**3, "moved_bytes": moved}
            row |= {"arithmetic_s": cubes * k**3 / rate / share, "moving_s": moved / bytes_per_s}
            rows.append(row)
    figures = {"cubes": cubes, "share_of_product_rate": share, "moved_over_planned": more, "nvme": NVME, "rows": rows}
    write(__file__, figures)
