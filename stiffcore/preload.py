"""Imported once by the server that workers are forked from, so that they share its memory: see `stiffcore.cluster`."""

import gc
import warnings

import torch

from stiffcore.memory import keep_freed_pages

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
keep_freed_pages()
torch.set_num_threads(1)  # no thread pool may exist when a worker is forked

from stiffcore import survey, unit  # noqa: E402, F401
from stiffcore.jacobian.reduction import is_residual  # noqa: E402

# a first trace and a first product import another 900 modules
is_residual(lambda x: x + x.relu(), torch.ones(1, 3))
# collections in the workers would copy the pages that they share
gc.collect()
gc.freeze()
