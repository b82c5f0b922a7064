"""The files that a run writes while it trains: metrics.jsonl, a line a step; the bar; TensorBoard's files; damaged images."""

import json
import math
import time
from itertools import takewhile

import torch
from tqdm import tqdm

from ..ops.memory import peak_bytes
from .arrays import whole_lines, write_text

BINS = 40  # of the histograms, over cosines from -1 to 1


class Log:
    """A run's log. Steps are collected on the device and written together by `flush`, which waits for it; metrics by rank 0."""

    def __init__(self, out, start, ranks, config):
        writes = ranks.rank == 0
        self.out, self.ranks, self.writes, self.waiting, self.images, self.bar = out, ranks, writes, [], 0, None
        self.pieces, self.since = config.accumulate, time.perf_counter()
        self.known = self._known()
        if writes:
            _truncate(out / "metrics.jsonl", start)
        self.board = _tensorboard(out) if config.tensorboard and writes else None

    def progress(self, total, start):
        self.bar = tqdm(total=total, initial=start, unit="step", disable=None if self.writes else True, dynamic_ncols=True)
        self.since = time.perf_counter()
        return self.bar

    def say(self, line):
        if self.writes:
            tqdm.write(f"cosface: {line}")

    def add(self, step, rate, loss, found, images):
        """Add one piece of the batch of step `step`, counted from 0. found: the head's Statistics."""
        means = [each.double().nanmean() for each in (found.target_cosine, found.negative_cosine, found.correct)]
        self.waiting.append((step + 1, rate, torch.stack([loss.detach().double(), *means]), found))
        self.images += images

    def flush(self, device):
        """Write the steps since the last flush. All ranks call it.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not self.waiting:
            return
        numbers = torch.stack([each for *_, each, _ in self.waiting]).cpu()
        histograms = [self._histogram(name) for name in ("target_cosine", "negative_cosine")]
        everyone = self.ranks.objects((numbers, histograms))
        numbers = torch.stack([each for each, _ in everyone]).unflatten(1, (-1, self.pieces))
        losses, numbers = numbers[..., 0].mean((0, 2)).tolist(), numbers[..., 1:].nanmean((0, 2)).tolist()
        histograms = [sum(each).long().tolist() for each in zip(*(found for _, found in everyone), strict=True)]
        now = time.perf_counter()
        speed, self.since, self.images = self.images / (now - self.since), now, 0
        lines = []
        for (step, rate, *_), loss, values in zip(self.waiting[:: self.pieces], losses, numbers, strict=True):
            named = zip(("target_cosine", "negative_cosine", "top1"), values, strict=True)
            lines.append(
                {"step": step, "lr": rate, "loss": loss} | {name: value for name, value in named if math.isfinite(value)}
            )
        self.waiting.clear()
        if bad := [line["step"] for line in lines if not math.isfinite(line["loss"])]:
            raise FloatingPointError(
                f"the loss of step {bad[0]} is not finite, and nothing since the last checkpoint is kept: a smaller lr, a longer "
                "warmup or clip=5 help; --resume goes on from that checkpoint"
            )
        lines[-1] |= {"images_per_second": round(speed, 1), "memory": peak_bytes(device)}
        lines[-1] |= dict(zip(("target_histogram", "negative_histogram"), histograms, strict=True))
        if self.writes:
            self._write(lines)

    def _histogram(self, name):
        values = torch.cat([getattr(found, name) for *_, found in self.waiting]).float().cpu()
        return torch.histc(values[values.isfinite()], BINS, -1, 1)

    def _write(self, lines):
        with open(self.out / "metrics.jsonl", "a") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
        last = lines[-1]
        self.bar.set_postfix_str(
            f"loss {last['loss']:.3f}, lr {last['lr']:.3g}, {last['images_per_second']:.0f} images/s, "
            f"{last['memory'] / 1e9:.2f} GB",
            refresh=False,
        )
        self.bar.update(last["step"] - self.bar.n)
        for line in lines if self.board else ():
            for name in line.keys() & {"loss", "lr", "target_cosine", "negative_cosine", "top1", "images_per_second"}:
                self.board.add_scalar(name, line[name], line["step"])

    def _known(self):
        """The names in damaged.txt, which all processes write."""
        path = self.out / "damaged.txt"
        return {line.partition(": ")[0] for line in path.read_text().splitlines()} if path.exists() else set()

    def damaged(self, found, limit):
        """Write down the names of damaged images that are new.

        Raises:
            RuntimeError: there are more than `limit`.
        """
        found = dict(found.values())
        if found.keys() - self.known:
            self.known = self._known()
        lines = [f"{name}: {why}" for name, why in found.items() if name not in self.known]
        if not lines:
            return
        self.known.update(found)
        with open(self.out / "damaged.txt", "a") as stream:
            stream.write("".join(f"{line}\n" for line in lines))
        if len(self.known) > limit:
            raise RuntimeError(
                f"{len(self.known)} damaged images, more than max_damaged={limit}; the last is {lines[-1]}; all: "
                f"{self.out / 'damaged.txt'}; raise max_damaged, or remove them and begin a new run"
            )


def _truncate(path, step):
    """Leave the lines of the first `step` steps; what came after the checkpoint is computed again."""
    if path.exists():
        kept = takewhile(lambda line: json.loads(line)["step"] <= step, whole_lines(path))
        write_text(path, "".join(f"{line.decode()}\n" for line in kept))


def _tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")
