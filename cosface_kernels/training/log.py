"""What a run writes down while it trains: metrics.jsonl, a line a step; the bar; TensorBoard's files; damaged images."""

import json
import os
import resource
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

BINS = 40  # of the histograms, over cosines from -1 to 1


class Log:
    """Steps are collected on the device and written together by `flush`, which waits for it. Only rank 0 writes metrics."""

    def __init__(self, out, start, writes, config):
        self.out, self.writes, self.waiting, self.images, self.bar, self.board = out, writes, [], 0, None, None
        self.pieces, self.since = config.accumulate, time.perf_counter()
        self.known = set((out / "damaged.txt").read_text().splitlines()) if (out / "damaged.txt").exists() else set()
        if writes:
            _truncate(out / "metrics.jsonl", start)
            self.board = _tensorboard(out) if config.tensorboard else None

    def progress(self, total, start):
        self.bar = tqdm(total=total, initial=start, unit="step", disable=None if self.writes else True, dynamic_ncols=True)
        self.since = time.perf_counter()
        return self.bar

    def say(self, line):
        if self.writes:
            tqdm.write(f"cosface: {line}")

    @torch.no_grad()
    def add(self, step, rate, loss, features, labels, head, images):
        """One piece of step `step`, counted from 0."""
        self.waiting.append((step + 1, rate, loss.detach(), target_cosines(head, features, labels)))
        self.images += images

    def flush(self, device):
        """Write the steps since the last flush.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not self.waiting:
            return
        losses = torch.stack([loss for _, _, loss, _ in self.waiting]).double().tolist()
        cosines = torch.cat([each for *_, each in self.waiting])
        counts = torch.histc(cosines.cpu(), BINS, -1, 1).long().tolist()
        means = [each.mean().item() if len(each) else None for *_, each in self.waiting]
        now = time.perf_counter()
        speed, self.since, self.images = self.images / (now - self.since), now, 0
        lines = []
        for first in range(0, len(losses), self.pieces):
            step, rate, *_ = self.waiting[first]
            part = slice(first, first + self.pieces)
            found = [each for each in means[part] if each is not None]
            cosine = {"target_cosine": sum(found) / len(found)} if found else {}
            lines.append({"step": step, "lr": rate, "loss": sum(losses[part]) / self.pieces, **cosine})
        self.waiting.clear()
        if bad := [line["step"] for line in lines if not abs(line["loss"]) < float("inf")]:
            raise FloatingPointError(
                f"the loss of step {bad[0]} is not finite, and nothing since the last checkpoint is kept: a smaller lr, a longer "
                "warmup or clip=5 help; --resume goes on from that checkpoint"
            )
        lines[-1] |= {"images_per_second": round(speed, 1), "memory": peak_memory(device)}
        if cosines.numel():
            lines[-1]["target_histogram"] = counts
        if self.writes:
            self._write(lines)

    def _write(self, lines):
        with open(self.out / "metrics.jsonl", "a") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
        last = lines[-1]
        self.bar.set_postfix_str(
            f"loss {last['loss']:.3f}, lr {last['lr']:.3g}, {last['images_per_second']:.0f} images/s", refresh=False
        )
        self.bar.update(last["step"] - self.bar.n)
        for line in lines if self.board else ():
            for name in line.keys() & {"loss", "lr", "target_cosine", "images_per_second"}:
                self.board.add_scalar(name, line[name], line["step"])

    def damaged(self, found, limit):
        """Write down the names of damaged images that are new.

        Raises:
            RuntimeError: there are more than `limit`.
        """
        new = {name: why for name, why in found.values() if f"{name}: {why}" not in self.known}
        if not new:
            return
        lines = [f"{name}: {why}" for name, why in new.items()]
        self.known.update(lines)
        with open(self.out / "damaged.txt", "a") as stream:
            stream.write("".join(f"{line}\n" for line in lines))
        if len(self.known) > limit:
            raise RuntimeError(
                f"{len(self.known)} damaged images, more than max_damaged={limit}; the last is {lines[-1]}; all: "
                f"{self.out / 'damaged.txt'}; remove them, or raise max_damaged"
            )


def target_cosines(head, features, labels):
    """The cosines (N,) of features with their own class, its best sub-centre; none of a sharded table."""
    if head.placement.local(head.weight) is not head.weight:
        return features.new_empty(0)
    rows = labels[:, None] * head.centers_per_class + torch.arange(head.centers_per_class, device=labels.device)
    return torch.einsum("nd,nkd->nk", F.normalize(features.float()), F.normalize(head.weight[rows].float(), dim=2)).amax(1)


def peak_memory(device):
    """Bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _truncate(path, step):
    """Leave the lines of the first `step` steps; what came after the checkpoint is computed again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)


def _tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")
