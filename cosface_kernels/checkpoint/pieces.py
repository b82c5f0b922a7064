"""Makes torch.distributed.checkpoint (DCP) write and read tensors in pieces of at most 64 MiB.

DCP writes a tensor's local shard as one item and reads an item into memory before it copies from it, so that a table of 50 GB
would need 50 GB more to be loaded, and on each rank all of it when the number of ranks is another. Pieces bound both.
"""

import dataclasses

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType

from ..distributed import dtensors

PIECE_BYTES = 2**26


class PiecewiseSavePlanner(DefaultSavePlanner):
    """Saves slices along the first dimension; of plain tensors, which are alike on all ranks, those of rank 0."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)

    def create_local_plan(self):
        plan = super().create_local_plan()
        self.pieces = {}
        self.plan = dataclasses.replace(plan, items=[piece for item in plan.items for piece in self._cut(item)])
        return self.plan

    def _cut(self, item):
        whole, chunk = dtensors.local(self.state_dict[item.index.fqn]), item.tensor_data.chunk
        if not (whole.dim() and whole.numel()):
            self.pieces[item.index] = whole
            yield item
            return
        rows = max(1, PIECE_BYTES // (whole[0].numel() * whole.itemsize))
        for start in range(0, len(whole), rows):
            piece = whole[start : start + rows]
            offsets = torch.Size([chunk.offsets[0] + start, *chunk.offsets[1:]])
            index = dataclasses.replace(item.index, offset=offsets)
            data = dataclasses.replace(item.tensor_data, chunk=dataclasses.replace(chunk, offsets=offsets, sizes=piece.shape))
            self.pieces[index] = piece
            yield dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index):
        return self.pieces[index]


class RowsLoadPlanner(DefaultLoadPlanner):
    """Loads the rows that the checkpoint has; further rows of a tensor keep their values."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        sizes = {
            name: dataclasses.replace(saved, size=state_dict[name].size())
            for name, saved in metadata.state_dict_metadata.items()
            if name in state_dict
        }
        super().set_up_planner(state_dict, dataclasses.replace(metadata, state_dict_metadata=sizes), is_coordinator)
