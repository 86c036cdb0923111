"""What every benchmark shares: the machine it ran on, and where its figures go."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from stiffcore.jacobian.reduction import is_residual
from stiffcore.networks.blocks import capture, residual_blocks
from stiffcore.networks.images import load_images, network_input
from stiffcore.networks.zoo import load_network
from stiffcore.study import versions

RESULTS = Path(__file__).parent / "results"


def machine():
    """Facts of this machine, as JSON values."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **versions(),
    }


def stiffcore(*args):
    """Run the command line in a fresh process: what it printed, and its seconds."""
    program = [sys.executable, "-c", "from stiffcore.cli import main; main()", *map(str, args)]
    start = time.perf_counter()
    found = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout, time.perf_counter() - start


def block_calls(network):
    """Every residual block of a bundled network at the first sample image, in float64, by name."""
    opened = load_network(network, None, torch.float64)
    x = network_input(load_images("samples").x[0], opened.normalize, torch.float64)
    return capture(opened.module, x, residual_blocks(opened.module, x, is_residual))[0]


def write(script, figures):
    """Write and print the figures of a benchmark."""
    RESULTS.mkdir(exist_ok=True)
    command = f"python bench/{Path(script).name}"
    result = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "figures": figures}
    (RESULTS / f"{Path(script).stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
