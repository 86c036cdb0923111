"""What can the machine do: rates of the dense kernels that every cost in this project is made of.

In float64, on the host with all cores or, with `--device cuda`, on the device: a product, an LU, a triangular solve
and a QR of order 8,192 (`--quick`: 1,024), the median of three; all eigenvalues of random matrices, once after a
first time, on a device up to order 8,192, with its peak memory, and what is planned for that; copies to the device
and back; and writing and reading 1 GiB on disk.
"""

import statistics
import tempfile
import threading
import time
from contextlib import contextmanager

import numpy as np
import torch
from common import QUICK, device, disk_rates, write

from stiffcore.eigen import dense
from stiffcore.eigen.device import device_eigenvalues, device_eigenvectors

ORDER = 1024 if QUICK else 8192
EIGENVALUES = (512,) if QUICK else (1024, 2048, 4096) + ((8192,) if device() != "cpu" else ())
COPIED = 1 << (26 if QUICK else 30)
REPEATS = 3


def synchronize():
    if device() != "cpu":
        torch.cuda.synchronize()


def seconds(work, repeats=REPEATS):
    work()  # loads the library
    taken = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def kernels(n):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn((n, n), generator=generator, dtype=torch.float64).to(device())
    factor = torch.linalg.lu_factor(a)[0]
    work = {  # Golub & Van Loan, 4th ed., sections 1.1, 3.4, 3.1 and 5.2
        "product": (lambda: a @ a, 2 * n**3),
        "lu": (lambda: torch.linalg.lu_factor(a), 2 * n**3 / 3),
        "triangular_solve": (lambda: torch.linalg.solve_triangular(factor, a, upper=True), n**3),
        "qr": (lambda: torch.linalg.qr(a, mode="r"), 4 * n**3 / 3),
    }
    return {name: flops / seconds(call) for name, (call, flops) in work.items()}


@contextmanager
def watched(found, name):
    """The device's peaks: what torch's allocator held, and by how much the device's free memory fell in all."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free, over = [torch.cuda.mem_get_info()[0]], threading.Event()

    def watch():
        while not over.wait(0.002):
            free.append(torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    found[f"{name}_allocated_bytes"] = torch.cuda.max_memory_allocated()
    found[f"{name}_taken_bytes"] = free[0] - min(free)


def eigenvalues(k):
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((k, k)))
    found = {"k": k}
    if device() == "cpu":
        found["seconds"] = seconds(lambda: dense.hessenberg_eigenvalues(dense.to_hessenberg(a.copy(order="F"))), 1)
    else:
        with watched(found, "values"):
            found["seconds"] = seconds(lambda: device_eigenvalues(a, device()), 1)
        values = np.array([0.5 + 0.5j])  # no eigenvalue: inverse iteration takes all its steps
        with watched(found, "vectors"):
            found["vectors_seconds"] = seconds(lambda: device_eigenvectors(a, values, device()), 1)
        found["planned_bytes"] = dense.device_bytes(k, 8)
    found["flops_per_s"] = (dense.to_hessenberg_flops(k) + dense.hessenberg_eigenvalues_flops(k)) / found["seconds"]
    print(found, flush=True)
    return found


def copies():
    if device() == "cpu":
        return {}
    found = {}
    for name in ("pageable", "pinned"):
        here = torch.ones(COPIED // 8, dtype=torch.float64, pin_memory=name == "pinned")
        there = here.to(device())
        found[f"to_device_{name}"] = COPIED / seconds(lambda h=here, t=there: t.copy_(h))
        found[f"to_host_{name}"] = COPIED / seconds(lambda h=here, t=there: h.copy_(t))
    return found


if __name__ == "__main__":
    name = torch.cuda.get_device_name() if device() != "cpu" else None
    figures = {"device": name, "order": ORDER, "flops_per_s": kernels(ORDER)}
    figures["eigenvalues"] = [eigenvalues(k) for k in EIGENVALUES]
    with tempfile.TemporaryDirectory() as folder:
        disk = {f"disk_{name}": rate for name, rate in disk_rates(folder, COPIED).items()}
    write(__file__, figures | {"bytes_per_s": copies() | disk})
