"""Sessions in forked children, so that the imports are paid once; the store fails at an operation in one of three ways.

The argument is JSON: (URL, number of the operation or 0 for never, how) of each session.
"""

import errno
import json
import os
import signal
import sys

from zarr.storage import LocalStore

import stiffcore.preload  # noqa: F401 - torch, once for all children
from stiffcore.asked import check_free
from stiffcore.cluster import InProcess
from stiffcore.errors import NoRunError, StiffcoreError
from stiffcore.session import carry_out_plan, prepare
from stiffcore.store import RunStore

sys.path.insert(0, os.getcwd())
OPTIONS = {"network": "smallnet:make", "images": "six.npz", "blocks": "4", "count": 1}
OPERATIONS = ("get", "set", "set_if_not_exists", "exists", "delete", "delete_dir", "list", "list_dir", "list_prefix")
count = 0


def tear(store, name, args):
    if name in ("set", "set_if_not_exists"):
        path, data = store.root / args[0], args[1].to_bytes()
        if name == "set_if_not_exists" and path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[: len(data) // 2])
    if name == "delete_dir":
        for path in [p for p in (store.root / args[0]).rglob("*") if p.is_file()][::2]:
            path.unlink()


def wrapped(name, at, how):
    inner = getattr(LocalStore, name)

    def due(store, args):
        global count
        count += 1
        if count == at and how == "error":
            raise OSError(errno.EIO, "a fault of the store")
        if count == at:
            if how == "torn":
                tear(store, name, args)
            os.kill(os.getpid(), signal.SIGKILL)

    if name.startswith("list"):

        async def operation(self, *args, **kwargs):
            due(self, args)
            async for key in inner(self, *args, **kwargs):
                yield key
    else:

        async def operation(self, *args, **kwargs):
            due(self, args)
            return await inner(self, *args, **kwargs)

    return operation


def begun(url):
    try:
        return RunStore(url).header is not None
    except NoRunError:
        return False


def session(url, at, how):
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for name in OPERATIONS:
        setattr(LocalStore, name, wrapped(name, at, how))
    try:
        executor = InProcess(lambda event: None)
        check_free(url)
        # what was killed before its header was written is no run yet: its command starts it once more
        prepared = prepare(url, {} if begun(url) else OPTIONS, executor, trust=True)
        failed = carry_out_plan(url, prepared, executor, lambda event: None)[1].failed
    except (StiffcoreError, OSError) as error:
        print("SAID", url, at, how, str(error).replace(chr(10), " "), flush=True)
        os._exit(4)
    if failed:
        print("FAILED", url, at, how, str(failed).replace(chr(10), " "), flush=True)
    print("COUNT", count, flush=True)
    os._exit(5 if failed else 0)


for url, at, how in json.loads(sys.argv[1]):
    print("ENDED", session(url, at, how), url, at, how, flush=True)
