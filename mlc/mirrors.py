"""Views of the log elsewhere: Weights & Biases, TensorBoard.

A server may be slow, unreachable or broken, and a run takes days: so each view has a thread of its own. Training hands
it lines and never waits for it; what goes wrong there is one line for people, and `log.jsonl` is whole in any case.
"""

import json
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mlc.config import Config
from shards.console import UserError
from shards.json_text import to_json

WAITING_LINES = 100_000  # lines kept for a view that does not take them; later ones are dropped and counted
CLOSE_SECONDS = 30.0  # how long the end of a run waits for a view
INIT_SECONDS = 60.0  # until W&B counts as unreachable
Values = dict[str, Any]


class View(Protocol):
    def write(self, values: Values) -> None: ...

    def close(self, final: Values) -> None: ...


class Mirror:
    """Passes lines on to a view, in order, from a thread in which the view is also opened and closed."""

    def __init__(self, name: str, open_view: Callable[[], View], say: Callable[[str], None]):
        self._name, self._open, self._say = name, open_view, say
        self._lines: queue.Queue[Values | None] = queue.Queue(WAITING_LINES)
        self._dropped, self._final = 0, {}
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, values: Values) -> None:
        try:
            self._lines.put_nowait(values)
        except queue.Full:
            self._dropped += 1

    def close(self, final: Values) -> None:
        """Gives the view the last values and some time; a view that needs more is left behind."""
        self._final = final
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=CLOSE_SECONDS)
                self._thread.join(CLOSE_SECONDS)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._say(f"{self._name} does not answer; the run is complete without it, see log.jsonl")
        if self._dropped:
            self._say(f"{self._name}: {self._dropped} lines were dropped, it took none for too long; see log.jsonl")

    def _work(self) -> None:
        try:
            view = self._open()
            while (values := self._lines.get()) is not None:
                view.write(values)
            view.close(self._final)
        except Exception as error:  # whatever a view's library raises must not reach the training
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._say(f"{self._name} is off from here on ({reason}); the run goes on, see log.jsonl")


def open_mirrors(folder: Path, config: Config, say: Callable[[str], None], resumed_step: int | None) -> list[Mirror]:
    """The views that the settings ask for. Raises UserError where a package is missing."""
    mirrors = []
    if config.log_wandb:
        mirrors.append(Mirror("W&B", lambda: Wandb(folder, config, say), say))
    if config.log_tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise UserError('--log-tensorboard needs a package: pip install "mlc[tensorboard]"') from None
        mirrors.append(Mirror("TensorBoard", lambda: TensorBoard(folder, resumed_step), say))
    return mirrors


class Wandb:
    """One run for one folder, also after a resume: its id lies in the folder, and so does what was already sent.

    A resumed run makes some lines anew, the same ones; they are not sent again. Without an answer from the server the
    run is written to disk, for `wandb sync`.
    """

    def __init__(self, folder: Path, config: Config, say: Callable[[str], None]):
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {
            "project": config.wandb_project,
            "group": config.wandb_group or None,
            "tags": config.wandb_tags or None,
            "name": folder.name,
            "id": id_file.read_text().strip(),
            "resume": "allow",
            "dir": str(folder),
            "config": vars(config),
            "settings": wandb.Settings(init_timeout=INIT_SECONDS),
        }
        try:
            self.run = wandb.init(mode=config.wandb_mode or None, **options)
        except Exception as error:
            say(f"W&B cannot be reached ({type(error).__name__}); writing to disk instead: wandb sync {folder}/wandb/*")
            wandb.teardown()  # its helper process still holds the id
            self.run = wandb.init(mode="offline", **options)
        if url := getattr(self.run, "url", None):  # there is none offline; `mlc report` links to it
            (folder / "wandb_url").write_text(url + "\n")
        self.run.define_metric("*", step_metric="step")
        self._folder, self._artifacts = folder, config.wandb_artifacts
        self._mark = folder / "wandb_sent.json"
        self._sent = tuple(json.loads(self._mark.read_text())) if self._mark.exists() else (-1, False)

    def write(self, values: Values) -> None:
        samples = values.pop("samples", None)
        place = (values["step"], any(name.startswith("val") for name in values))
        if place > self._sent:
            self.run.log(values | ({"val/samples": _table(samples)} if samples else {}))
            self._mark.write_text(to_json(place))

    def close(self, final: Values) -> None:
        self.run.summary.update(final)
        weights = next((self._folder / name for name in ("best", "last") if (self._folder / name).is_dir()), None)
        if self._artifacts and weights:
            import wandb

            artifact = wandb.Artifact(f"{self._folder.name}-{weights.name}", type="model")
            artifact.add_dir(str(weights))
            self.run.log_artifact(artifact)
        self.run.finish()


def _table(samples: list[Values]):
    import wandb

    rows = [[wandb.Image(s["image"]), *(s[name] for name in list(s)[1:])] for s in samples]
    return wandb.Table(columns=list(samples[0]), data=rows)


class TensorBoard:
    def __init__(self, folder: Path, resumed_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, values: Values) -> None:
        for name, value in values.items():
            if "/" in name and isinstance(value, int | float):
                self._writer.add_scalar(name, value, values["step"])

    def close(self, final: Values) -> None:
        self._writer.close()
