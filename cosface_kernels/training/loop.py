"""The training loop: steps, signals, checkpoints. A killed run goes on from its last checkpoint with the same numbers."""

import contextlib
import errno
import json
import os
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import CorruptCheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from ..distributed.ranks import world
from . import config as settings
from . import data, environment, evaluate, model, report
from .arrays import read_json, write_text
from .config import ConfigError
from .log import Log


def train(config, resume=False):
    """Train, or go on. Returns the exit status: 0 done, 128 + the signal's number if one stopped it.

    Raises:
        ConfigError: settings that do not fit each other, the data or the run's folder; nothing was written.
        OSError, RuntimeError: a disk, a worker or the loss failed; the run can be resumed.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, and PyTorch finds no GPU here: `cosface info` says more; device=cpu trains without")
    with _processes(config):
        run = Run(config, resume)
        with _Signals() as signals:
            try:
                return run.train(signals)
            except (OSError, RuntimeError, ValueError) as error:
                raise _with_remedy(error, config.out) from error


def _with_remedy(error, out):
    """An error that may come anywhere in a step, saying what to do: of a worker that died, a full disk, an image that is left
    alone. Any other as it is."""
    goes_on = f"`cosface train --resume out={out}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(f"the disk of {out} is full: {error.strerror}; make room, then {goes_on}` goes on")
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return RuntimeError(
            f"a worker that reads images died: {str(error).splitlines()[0].strip()} Often memory, or /dev/shm, is too small; "
            f"{goes_on} workers=0` goes on, and reads in the main process"
        )
    if "Expected more than 1 value per channel" in str(error):
        return RuntimeError(
            f"one image is left of a batch, and the backbone's batch statistics need two: {out}/damaged.txt names the others; "
            f"without them in the data, or with a larger batch_size, a new run goes on"
        )
    return error


@contextlib.contextmanager
def _processes(config):
    """A process group, under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    cuda = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Signals:
    """SIGINT and SIGTERM set `got`; the second one acts as it would without us."""

    def __enter__(self):
        self.got, self.before = 0, {}
        for each in (signal.SIGINT, signal.SIGTERM):
            self.before[each] = signal.signal(each, self._note)
        return self

    def _note(self, number, _):
        self.got = number
        self.__exit__()

    def __exit__(self, *_):
        for number, before in self.before.items():
            signal.signal(number, before)


class Run:
    """A run: its parts, and its folder, which is made when all parts are there."""

    def __init__(self, config, resume):
        self.config, self.ranks, self.out = config, world(), Path(config.out)
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if config.batch_size % (config.accumulate * self.ranks.size):
            raise ConfigError(
                f"batch_size={config.batch_size} must be a multiple of accumulate={config.accumulate} times "
                f"{self.ranks.size} processes"
            )
        self.source = data.open_source(config)
        if self.source.num_classes < 2:
            raise ConfigError(f"data: {config.data} has one identity, from which there is nobody to tell apart: two are needed")
        steps = len(self.source) // config.batch_size
        if not steps:
            raise ConfigError(
                f"data: {config.data} has {len(self.source)} images, fewer than batch_size={config.batch_size}: lower that"
            )
        self.total = steps * config.epochs
        self.margin = model.margin_of(config.margin)
        model.check_margin_warmup(config, self.margin)
        self.model = model.Model(config, self.source.num_classes, self.device, self.ranks)
        self.optimizers = model.optimizers(config, self.model)
        self.start = self._open_folder(resume)
        self.network = torch.compile(self.model.backbone) if config.compile else self.model.backbone
        if self.ranks.size > 1:
            self.network = DistributedDataParallel(self.network)
        self.log = Log(self.out, self.start, self.ranks, config)

    def _open_folder(self, resume):
        """Make the run's folder, or load the last checkpoint of the one that is there. Returns the number of steps done."""
        self.ranks.together("the making of the run's folder", lambda: self._make_folder(resume) if self.ranks.rank == 0 else None)
        found = self.ranks.objects(latest_checkpoint(self.out / "checkpoints"))[0]
        if found is None:
            return 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*random number generators were not restored")
            try:
                return load_checkpoint(found, self.model, self.optimizers)["step"]
            except ValueError as error:
                raise ConfigError(f"the backbone is not that of the run's checkpoint: {error}") from error
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(f"{error}; without {found} --resume goes on from the one before it") from error

    def _make_folder(self, resume):
        if (self.out / "config.yaml").exists():
            if not resume:
                raise ConfigError(
                    f"{self.out} has a run already: --resume goes on with it; or choose another out=, or remove the folder"
                )
            return self._check_data()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(f"{self.out} is no run and not empty: choose another out=")
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "config.yaml", settings.text(self.config))
        write_text(self.out / "environment.json", json.dumps(environment.describe(self), indent=2) + "\n")

    def _check_data(self):
        """Raise unless there are as many images as when the run began: which are in a step depends on it."""
        names = "images", "identities"
        began, now = read_json(self.out / "environment.json") or {}, environment.describe(self)
        if any(began.get(name, now[name]) != now[name] for name in names):
            raise ConfigError(
                f"data: {self.config.data} has {now['images']:,} images of {now['identities']:,} identities now, and the run in "
                f"{self.out} began with {began['images']:,} of {began['identities']:,}: a new run is needed, with another out="
            )

    def train(self, signals):
        self.model.backbone.train(), self.model.head.train()
        order = data.order(len(self.source), self.config, self.ranks, self.start, self.total)
        pieces = self._pieces(data.batches(self.source, self.config, order, self.device.type == "cuda"))
        step, saved = self.start, self.start
        for line in getattr(self.source, "remarks", tuple)() if self.ranks.rank == 0 else ():
            self.log.say(line)
        with self.log.progress(self.total, self.start):
            while step < self.total and not self._stopped(signals, step):
                self._step(step, pieces)
                step += 1
                saves = step % self.config.checkpoint_every == 0 and step < self.total
                if saves or step % self.config.log_every == 0:
                    self.log.flush(self.device)
                if saves:
                    saved = self._save(step)
            self.log.flush(self.device)
        if step > saved:
            self._save(step)
        if self.ranks.rank == 0:
            self._report(step)
        return self._goodbye(step, signals)

    def _report(self, step):
        backbone = (self.model.backbone if self.config.ema is None else self.model.ema).eval()
        report.keep_sphere(self.out, backbone, self.source, self.device)
        if step == self.total and self.config.data.startswith("faces:"):
            evaluate.write_held_out(self.out / "held_out.json", backbone, self.config, self.source.num_classes, self.device)
        report.write(self.out)

    def _goodbye(self, step, signals):
        if step == self.total:
            self.log.say(f"done: {step} steps; {self.out / 'report.html'}")
            return 0
        self.log.say(f"stopped after step {step} of {self.total}, which is saved: cosface train --resume out={self.out} goes on")
        return 128 + (signals.got or signal.SIGTERM)

    def _step(self, step, pieces):
        config, head = self.config, self.model.head
        rate = model.learning_rate(config, step, self.total)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        head.margin = model.margin_at(config, self.margin, step, self.total)
        for piece in range(config.accumulate):
            images, labels = next(pieces)
            last = piece == config.accumulate - 1
            with contextlib.nullcontext() if last or self.ranks.size == 1 else self.network.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    features = self.network(data.prepare(images))
                    loss, found = head(features, labels, return_statistics=True)
                (loss / config.accumulate).backward()
            self.log.add(step, rate, loss, found, len(images) * self.ranks.size)
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.backbone.parameters(), config.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        if config.ema is not None:
            self.model.update_ema(config.ema)

    def _pieces(self, loader):
        """(images, labels) on the device; damaged images are written down, up to the limit."""
        for images, labels, damaged in loader:
            self.log.damaged(damaged, self.config.max_damaged)
            if not len(images):
                raise RuntimeError(f"no image of a batch can be read, such as {': '.join(next(iter(damaged.values())))}")
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _stopped(self, signals, step):
        """True if a signal came; processes agree on the step every log_every steps."""
        if self.ranks.size == 1:
            return signals.got
        return step % self.config.log_every == 0 and step > self.start and any(self.ranks.objects(signals.got))

    def _save(self, step):
        path = self.out / "checkpoints" / f"step-{step}"
        save_checkpoint(path, self.model, self.optimizers, extra={"step": step}, keep=self.config.keep)
        return step
