"""A warning for a plain table that each of several ranks trains for itself, because nothing averages its gradient.

After the first step that moves the table each rank writes some of its numbers into the process group's store, and reads its
neighbour's when they are there: nobody waits, and who averages in any way, or gives all ranks the same batch, hears nothing.
"""

import itertools
import json
import math
import warnings
import weakref

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..distributed import dtensors

ROWS = 64  # rows that are compared
STEPS = 100  # steps after which a neighbour that has written nothing trains no such head
TOLERANCE = 0.1  # of the norm; sums in another order differ by rounding, other batches by about 1

_known = weakref.WeakSet()  # heads that are or were compared
_numbers = itertools.count()
_compared, _hooks = [], []


def watch(head, weight):
    """Compare a head's table with the neighbour rank's after its first step. Called in every forward of a whole table."""
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()) or head in _known:
        return
    trains = torch.is_grad_enabled() and isinstance(weight, torch.nn.Parameter) and weight.requires_grad
    if dist.get_world_size() > 1 and trains and not dtensors.is_sharded(weight):
        _known.add(head)
        _compared.append(_Comparison(head, next(_numbers)))
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer, args, kwargs):
    _compared[:] = [each for each in _compared if not each.after_step(optimizer)]
    if not _compared:
        _hooks.pop().remove()


class _Comparison:
    """The table of a head before and after its first step."""

    def __init__(self, head, number):
        self.head, self.rank, self.size = weakref.ref(head), dist.get_rank(), dist.get_world_size()
        self.before, self.steps, self.own = _sums(head), 0, None
        self.key = f"cosface_kernels/table/{number}/{tuple(head.weight.shape)}".replace(" ", "")

    def after_step(self, optimizer):
        """True if there is nothing more to compare."""
        head = self.head()
        if head is None or not dist.is_initialized() or dtensors.is_sharded(head.weight):
            return True
        if not any(head.weight is each for group in optimizer.param_groups for each in group["params"]):
            return False
        if head.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        self.steps += 1
        store = dist.distributed_c10d._get_default_store()
        if self.own is None:
            after = _sums(head)
            if len(after) != len(self.before) or torch.equal(after, self.before):  # grown, or a step that was skipped
                return self.steps == STEPS
            self.own = [self.before.tolist(), (after - self.before).tolist()]
            store.set(f"{self.key}/{self.rank}", json.dumps(self.own))
        other = (self.rank + 1) % self.size
        if not store.check([f"{self.key}/{other}"]):
            return self.steps == STEPS
        if any(map(_differ, self.own, json.loads(store.get(f"{self.key}/{other}")))):
            warnings.warn(
                f"the class tables {tuple(head.weight.shape)} of rank {self.rank} and rank {other} differ after an optimiser "
                "step: nothing averages their gradients, so each rank trains a table of its own. ShardedCosFaceLoss and "
                "ShardedMarginSoftmaxLoss train one table over all ranks; without a fused optimiser, so does a head inside the "
                "model that DistributedDataParallel wraps",
                stacklevel=4,
            )
        return True


@torch.no_grad()
def _sums(head):
    """The sums of some rows of the table, spread over all of it: float64 (R,) on its device."""
    rows = head.weight.detach()
    chosen = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), dtype=torch.float64, device=rows.device).long()
    return rows[chosen].double().sum(1)


def _differ(ours, theirs):
    return len(ours) != len(theirs) or math.dist(ours, theirs) > TOLERANCE * max(math.hypot(*ours), math.hypot(*theirs))
