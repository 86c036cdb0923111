"""A session on the cluster of the scheduler file that is the argument; prints its events."""

import sys

from stiffcore.cluster import workers_at
from stiffcore.session import carry_out_plan, prepare
from tests.test_cluster import ONE

with workers_at(sys.argv[1], lambda event: print(event, flush=True)) as executor:
    options = ONE | {"network": "smallnet:make_writing", "memory": "3GiB"}
    carry_out_plan("run", prepare("run", options, executor), executor, print)
