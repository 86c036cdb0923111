"""At a signal, whenever it comes, a command ends with one line and its code, and leaves no process behind."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

RUN = ["run", "run", "--network", "smallnet:make_slow", "--images", "six.npz", "--blocks", "1", "--memory", "4GiB"]
CODE = "from stiffcore.__main__ import main; main()"


def start(*args, cwd, **options):
    program = [sys.executable, "-c", CODE, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=cwd, start_new_session=True, **pipes, **options)


def of_session(leader):
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except OSError:
            continue
    return found


def check_end(process, number):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors
    deadline = time.monotonic() + 30
    while of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert of_session(process.pid) == []
    return errors.splitlines()


def begun(process):
    """Wait until the handlers are there: before that, an interpreter that starts is simply ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with open(f"/proc/{process.pid}/status") as file:
            caught = int(next(line for line in file if line.startswith("SigCgt")).split()[1], 16)
        if caught >> (signal.SIGHUP - 1) & 1:
            return
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "group", "times", "after"),
    [
        (signal.SIGINT, True, 1, 0.0),  # while libraries are imported
        (signal.SIGINT, True, 3, 2.5),  # while workers start, as a terminal sends it, and again
        (signal.SIGHUP, True, 1, 5.0),
        (signal.SIGTERM, False, 2, 8.0),
    ],
)
def test_a_signal_ends_the_command_with_one_line(small, number, group, times, after):
    process = start(*RUN, cwd=small)
    begun(process)
    time.sleep(after)
    for _ in range(times):
        (os.killpg if group else os.kill)(process.pid, number)
        time.sleep(0.03)
    lines = check_end(process, number)
    assert len([line for line in lines if "stopped" in line]) <= 1  # of three, the second may end it at once
    assert times > 1 or any("stopped" in line for line in lines), lines


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_the_command(small):
    rng = random.Random(0)
    for _ in range(40):
        process, number = start(*RUN, cwd=small), rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        begun(process)
        time.sleep(rng.uniform(0, 12))
        for _ in range(rng.choice([1, 1, 2, 3])):
            (os.killpg if rng.random() < 0.5 else os.kill)(process.pid, number)
            time.sleep(rng.uniform(0, 0.3))
        if process.poll() != 0:  # it was over before
            check_end(process, number)


def test_a_killed_command_leaves_no_process_behind(small):
    process = start(*RUN, cwd=small)
    deadline = time.monotonic() + 60
    while len(of_session(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert of_session(process.pid) == []


def test_what_nohup_ignores_stays_ignored(small):
    process = start("--version", cwd=small, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, "stiffcore" in printed) == (0, True)


def test_a_closed_stdout_and_too_little_address_space_are_said_in_a_line(tmp_path):
    shell = f"{sys.executable} -c '{CODE}' --version"
    plan = shell.replace("--version", "plan x --network resnet18")
    for command, says in ((f"{shell} >&-", "standard output is closed"), (f"ulimit -v 300000; {plan}", "ulimit -v")):
        found = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert says in found.stderr.splitlines()[-1]
        assert "Traceback" not in found.stderr
