"""A gradient that is not finite ends the run before it changes anything; under a loss scaler, when it stays so."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mlc.data.dataset import Batch
from mlc.parallel import agree
from shards.console import UserError
from shards.dataset import Index
from shards.files import whole
from shards.json_text import to_json

FILE = "non-finite.json"  # in the run's folder
MOST_SKIPPED = 20  # steps in a row: by then a scaler has gone from 65536 to 1/16, so the scale is not the reason


class NonFiniteGuard:
    """Sees the gradient's norm of each step, on all processes alike, and keeps what the newest steps were made of."""

    def __init__(self, step: int, *, scaler: bool, folder: Path, indexes: Sequence[Index] = ()):
        """step: the last one that is done; scaler: whether a loss scaler skips steps and makes its scale smaller;
        folder: of the run; indexes: one for each data set, as `source` of a batch counts them."""
        self._begin = self._good = step
        self._allowed = MOST_SKIPPED if scaler else 0
        self._folder, self._indexes = folder, indexes
        self._kept: list[tuple[int, Batch, Tensor]] = []

    def saw(self, step: int, batch: Batch, loss: Tensor) -> None:
        """One micro-batch of this process and its share of the loss; nothing is read from the device."""
        names = ("position", "source", "row")
        self._kept.append((step, {name: batch[name] for name in names}, loss.detach()))

    def check(self, step: int, grad_norm: float, *, at_end: bool = False) -> None:
        """May be called again for the same step, by every process alike. at_end: it is the run's last.

        Raises:
            UserError: the gradient is not finite, and no smaller scale can help. The samples of the first step in
                which it was not are in `non-finite.json`.
        """
        if math.isfinite(grad_norm):
            self._good = step
            self._kept = [kept for kept in self._kept if kept[0] > step]
            return
        skipped = step - self._good
        none_taken = at_end and self._good == self._begin
        if skipped < self._allowed and not none_taken:
            return
        often = f" and was not finite in {skipped} steps, whatever the loss scale" if self._allowed else ""
        file = self._write(self._good + 1)
        images = f"{file} names the images of that step" if file else "--log-samples FILE names the images of each step"
        raise UserError(
            f"step {step}: the gradient is {grad_norm}{often}; the weights were not changed by it, the last checkpoint "
            f"is good. Try a lower --lr, --clip-grad 1 or --amp-dtype bf16 and --resume auto; {images}"
        )

    def _write(self, step: int) -> Path | None:
        """The file with the micro-batches of all processes in that step; None where it cannot be written."""
        own = [self._described(batch, loss) for at, batch, loss in self._kept if at == step]
        found = [{"rank": rank, **part} for rank, parts in enumerate(agree.gathered(own)) for part in parts]

        def write() -> Path | None:
            with suppress(OSError, UserError), whole(self._folder / FILE) as building:
                building.write_text(to_json({"step": step, "micro_batches": found}, indent=1) + "\n")
                return self._folder / FILE
            return None

        return agree.from_first(write) if found else None

    def _described(self, batch: Batch, loss: Tensor) -> dict[str, Any]:
        where = zip(batch["source"].tolist(), batch["row"].tolist(), strict=True)
        keys = [self._indexes[source].key(row) for source, row in where]
        return {"loss": loss.item(), "positions": batch["position"].tolist(), "keys": keys}
