"""Verification on rendered faces that were not trained on: held_out.json, which the report of a run shows."""

import numpy as np
import torch

from . import evaluate, faces, verification
from .all_pairs import AllPairs
from .arrays import write_json
from .data import prepare

IMAGES, BATCH = 4, 128  # images of an identity


@torch.no_grad()
def write(path, backbone, config, first, device):
    """Write rates of all pairs of `config.held_out` identities, whose numbers begin at `first`. Returns nothing.

    backbone: in eval mode.
    """
    labels = np.repeat(np.arange(first, first + config.held_out), IMAGES)
    images = np.tile(np.arange(IMAGES), config.held_out)
    rows = []
    for start in range(0, len(labels), BATCH):
        some = slice(start, start + BATCH)
        drawn = torch.from_numpy(faces.render(labels[some], images[some], config.image_size, config.seed))
        rows.append(backbone(prepare(drawn.to(device))).float().cpu())
    rows = torch.cat(rows).numpy()
    if not (np.isfinite(rows).all() and rows.any(1).all()):
        return
    pairs = AllPairs(rows, labels)
    found = evaluate.verification_of(verification.steps_of(pairs), pairs.accepted_of_identities)
    write_json(path, {"identities": config.held_out, "images": len(labels), "verification": found})
