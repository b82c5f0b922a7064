"""Does a run in processes of its own survive kill -9, stop at SIGTERM, and give the same curve on two ranks?"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("yaml")
pytest.importorskip("tqdm")

from cosface_kernels.tools import cli
from cosface_kernels.training import backbones

# BatchNorm, whose statistics are of all processes; a rate at which rounding is not blown up by the steps that follow.
TINY = [
    "data=faces:6:8",
    "image_size=16",
    "batch_size=16",
    "embedding_size=8",
    "backbone=small",
    "workers=0",
    "tensorboard=false",
]
TINY += ["held_out=4", "log_every=1", "lr=1e-3", "crop=0.1"]
pytestmark = pytest.mark.slow


def command(*arguments):
    return [sys.executable, "-m", "cosface_kernels", "train", *arguments]


def started(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def here(*arguments):
    """The command in this process, which has imported everything, with as many threads as the others have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["train", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)


def losses(run):
    path = run / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, process):
    until = time.monotonic() + 600
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.02)


def test_kill_and_resume(tmp_path):
    """Killed in mid-epoch after a checkpoint, gone on from it in a new process, stopped by SIGTERM, gone on again: one curve."""
    options = [*TINY, "epochs=10", "checkpoint_every=4"]  # three steps an epoch
    here(*options, f"out={tmp_path / 'whole'}")
    run = tmp_path / "run"
    killed = started(*options, f"out={run}")
    wait_for(lambda: len(losses(run)) >= 10, killed)
    killed.kill()
    killed.wait(timeout=600)
    saved = {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()}
    assert max(saved) > 0 and len(losses(run)) - max(saved) <= 4
    stopped = started("--resume", f"out={run}")
    wait_for(lambda: len(losses(run)) > max(saved) + 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    out, error = stopped.communicate(timeout=600)
    assert stopped.returncode == 128 + signal.SIGTERM, error
    assert f"cosface train --resume out={run} goes on" in out
    here("--resume", f"out={run}")
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 30
    found, wanted = (backbones.load_backbone(each)[0].state_dict() for each in (run, tmp_path / "whole"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_two_processes_give_the_curve_of_one(tmp_path):
    options = [*TINY, "epochs=2", "accumulate=2", "checkpoint_every=4"]
    here(*options, f"out={tmp_path / 'one'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    both = [sys.executable, *launch, *command(*options, f"out={tmp_path / 'two'}")[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(both, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one != sorted(one)
    assert two == pytest.approx(one, rel=1e-4)
    # One goes on with what two have saved.
    shutil.rmtree(tmp_path / "two/checkpoints/step-6")
    here("--resume", f"out={tmp_path / 'two'}")
    assert losses(tmp_path / "two")[:4] == two[:4] and losses(tmp_path / "two") == pytest.approx(one, rel=1e-4)
