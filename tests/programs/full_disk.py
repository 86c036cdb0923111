"""Commands in forked children on a disk that fills.

The disk is full from its `at`-th write on: no file or folder can be made, and none grows; or no file may be longer than
`size`, which the kernel sees to, for libraries of C. Units are worked on in the command's process, so that their writes
count too. The argument is JSON: (at, size, command) of each child.
"""

import builtins
import errno
import io
import json
import os
import resource
import sys
import traceback
from contextlib import nullcontext

# What commands import late is imported before the fork, once for all children, and while the disk takes files.
import h5py  # noqa: F401
import jinja2  # noqa: F401
import matplotlib.figure  # noqa: F401
import pyarrow  # noqa: F401

import stiffcore.preload
import stiffcore.report.page
import stiffcore.verify  # noqa: F401
from stiffcore import cli
from stiffcore.cluster import InProcess
from stiffcore.commands import working

FOLDER = os.getcwd()
sys.path.insert(0, FOLDER)
count, limit = 0, 0
opened, made, os_opened = io.open, os.mkdir, os.open


def due():
    global count
    count += 1
    if limit and count >= limit:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class File:
    def __init__(self, file):
        self._file = file

    def write(self, data):
        due()
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exc):
        return self._file.__exit__(*exc)

    def __iter__(self):
        return iter(self._file)


def ours(path):
    return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(FOLDER)


def open_(file, mode="r", *args, **kwargs):
    if not ours(file) or not set(mode) & set("wax+"):
        return opened(file, mode, *args, **kwargs)
    due()
    return File(opened(file, mode, *args, **kwargs))


def mkdir(path, *args, **kwargs):
    if ours(path) and not os.path.exists(path):
        due()
    return made(path, *args, **kwargs)


def os_open(path, flags, *args, **kwargs):
    if ours(path) and flags & os.O_CREAT and not os.path.exists(path):
        due()
    return os_opened(path, flags, *args, **kwargs)


def session(at, size, command):
    global limit
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        said = opened(reader).read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *said.rsplit("COUNT", 1)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    limit = at
    if size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    working.workers_at = lambda *args, **kwargs: nullcontext(InProcess(lambda event: None))
    builtins.open = io.open = open_
    os.mkdir, os.open = mkdir, os_open
    sys.argv = ["stiffcore", *command]
    code = 70
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    print("COUNT", count, flush=True)
    os._exit(code or 0)


for asked in json.loads(sys.argv[1]):
    code, said, writes = session(*asked)
    print(repr((code, int(writes), said)), flush=True)
