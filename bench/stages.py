"""Where does the time go: each stage's share, and what it makes of the machine's product rate and disk rate?

ResNet50's block 2 by its ends and ResNet18's layer2.1 by all eigenvalues, one worker, one core. The product rate is
that of a 2,048 x 2,048 matrix product, the disk rate that of 256 MiB written with fsync and read again, both in this
run. Operations of the dense stages: 10/3 k^3 for the Hessenberg form, 20/3 k^3 for its eigenvalues (Golub and
Van Loan); LAPACK deflates early and takes fewer, so that `solved` can be over the rate. `stored` forces the way that an
accumulated matrix took before it was held in memory: through the store.
"""

import tempfile

from common import QUICK, device, disk_rates, product_rate, stiffcore, write

from stiffcore import open_run
from stiffcore.eigen.dense import hessenberg_eigenvalues_flops, to_hessenberg_flops

CASES = {
    "ends": ["--network", "resnet50", "--blocks", "2", "--solver", "extremes"],
    "ends, stored": ["--network", "resnet50", "--blocks", "2", "--solver", "extremes", "--keep", "all"],
    "all": ["--network", "resnet18", "--blocks", "layer4.1" if QUICK else "layer2.1", "--solver", "host-dense"],
}
COMMON = ["--images", "samples", "--memory", "6GiB", "--workers", 1, "--device", device()]
REPEATS = 1 if QUICK else 3


def measured(options):
    """Of the repeats, the one that took least in its stages."""
    found = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            _, wall = stiffcore("run", folder + "/run", *options, *COMMON)
            [record] = [r.to_json() for r in open_run(folder + "/run").records().values()]
            names = ("block", "k", "nonzeros", "seconds", "measured_bytes")
            moved = record["plan"]["moved_bytes"]
            found.append({name: record[name] for name in names} | {"wall_s": wall, "planned_moved_bytes": moved})
    return min(found, key=lambda f: sum(f["seconds"].values()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rates = {"product_flops_per_s": product_rate(), "disk_bytes_per_s": disk_rates(folder)}
    cases = {name: measured(options) for name, options in CASES.items()}
    k, seconds = cases["all"]["k"], cases["all"]["seconds"]
    flops = {"reduced": to_hessenberg_flops(k), "solved": hessenberg_eigenvalues_flops(k)}
    dense = {name: count / seconds[name] for name, count in flops.items()}
    shares = {name: rate / rates["product_flops_per_s"] for name, rate in dense.items()}
    before, after = (sum(cases[name]["seconds"].values()) for name in ("ends, stored", "ends"))
    write(__file__, {**rates, "cases": cases, "share_of_product_rate": shares, "stored_over_held": before / after})
