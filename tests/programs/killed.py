"""Sessions of runs in forked children, so that the imports are paid once; a child ends by SIGKILL at an event, or well.

The argument is JSON: `options` of every session; `sessions`, each a run's URL and the number of the event to be killed
at, or 0; `cheap`, whether the solver `extremes` takes small orders too. A child that ends well prints the kinds of its
events, and the parent each child's status.
"""

import json
import os
import signal
import sys

import stiffcore.plan
import stiffcore.preload
import stiffcore.verify
from stiffcore.cluster import InProcess
from stiffcore.session import carry_out_plan, prepare


def session(url, at, options):
    """The status of a child that works on a run, and is killed at its `at`-th event."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    kinds = []

    def on_event(event):
        kinds.append(str(getattr(event, "stage", event.kind)))
        if len(kinds) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    executor = InProcess(on_event)
    prepared = prepare(url, options, executor)
    carry_out_plan(url, prepared, executor, on_event)
    print(json.dumps({"url": url, "at": at, "kinds": kinds}), flush=True)
    os._exit(0)


sys.path.insert(0, os.getcwd())
asked = json.loads(sys.argv[1])
if asked["cheap"]:
    stiffcore.plan.PRODUCT_COST = 0
for url, at in asked["sessions"]:
    status = session(url, at, asked["options"])
    print(json.dumps({"url": url, "at": at, "status": status}), flush=True)
