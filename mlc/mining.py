"""`--hard-mining`: the losses of an epoch's samples, and from them the list of the hardest for the next.

A list must be there before the first sample of its epoch is read, so workers read up to that step and no further; the
list is made from all steps before it. Losses are gathered on the device, each sample's largest one of the epoch: a
maximum is the same in whatever order, and over however many devices, it is taken.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mlc.config import Config
from mlc.data.dataset import Batch
from mlc.data.mixing import Mix
from mlc.data.sampler import Sampler
from mlc.parallel import checkpoint
from mlc.parallel.memory import to_device
from mlc.parallel.storage import Place

UNSEEN = -1.0  # below any loss
PART = "hard_mining"  # of a checkpoint


class HardMining:
    """Its state is three tensors: the losses of this epoch and of the one before, and the lists of rows."""

    def __init__(self, sampler: Sampler, device: torch.device, columns: Sequence[int]):
        """columns: the classes whose loss counts."""
        self._sampler, self._hard = sampler, sampler.sources[0].hard
        rows = len(sampler.sources[0].index)
        self._columns = torch.tensor(columns, device=device)
        self._now = torch.full((rows,), UNSEEN, device=device)
        self._before = self._now.clone()

    def add(self, batch: Batch, logits: Tensor, target: Tensor, mix: Mix | None = None) -> None:
        """Takes a micro-batch: logits and target [B, C] of its images as they were seen; of a mixed
        one, the loss is laid to a sample that is in it (`Mix.charged`)."""
        seen = logits.detach().float().index_select(1, self._columns)
        wanted = target.float().index_select(1, self._columns)
        loss = binary_cross_entropy_with_logits(seen, wanted, reduction="none").mean(1)
        source, row = batch["source"], batch["row"]
        if mix is not None:
            charged = mix.charged()
            source, row = source[charged], row[to_device(charged, row.device)]
        own = to_device(source == 0, loss.device)  # other data sets are not mined
        self._now.scatter_reduce_(0, row * own, torch.where(own, loss, UNSEEN), "amax")

    def until(self, global_batch: int) -> int:
        """The steps that begin at a position below this read nothing that the newest list is not for."""
        return (self._hard.newest + 1) * self._sampler.epoch_samples - global_batch + 1

    def renew(self, samples_seen: int, global_batch: int) -> bool:
        """Makes the next list where the step that begins now is the first to need it; says whether it did.

        Every process calls it at the same step.
        """
        if samples_seen < self.until(global_batch):
            return False
        self._gather()
        self._before = torch.where(self._now > UNSEEN, self._now, self._before)
        self._now.fill_(UNSEEN)
        epoch = (samples_seen + global_batch - 1) // self._sampler.epoch_samples
        self._hard.add(epoch, self._hard.hardest(self._before.cpu().numpy()))
        return True

    def _gather(self) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._now, dist.ReduceOp.MAX)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, the same on every process; all of them call it at the same step."""
        self._gather()
        lists = [torch.tensor([epoch, *rows.tolist()]) for epoch, rows in self._hard.lists.items()]
        lists = [torch.full_like(lists[0], -1)] * (2 - len(lists)) + lists
        return {"now": self._now, "before": self._before, "lists": torch.stack(lists)}

    def restore(self, folder: Place) -> bool:
        """Takes the state out of a checkpoint; False where it has none of this size."""
        state = self.state()
        found = checkpoint.tensors(folder)
        for name, tensor in state.items():
            if (there := found.get(f"{PART}.{name}")) is None or there.size != tensor.shape:
                return False
        checkpoint.load_more(folder, {PART: state})
        lists = state["lists"].tolist()
        self._hard.lists = {epoch: np.array(rows, np.int64) for epoch, *rows in lists if epoch >= 0}
        return True


def open_mining(config: Config, sampler: Sampler, device: torch.device, columns: Sequence[int]) -> HardMining | None:
    """None where nothing is mined, the list is made once from --hard-list, or the share is less than one sample."""
    wanted = config.hard_mining and not config.hard_list and sampler.sources[0].hard
    return HardMining(sampler, device, columns) if wanted else None
