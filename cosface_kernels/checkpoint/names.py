"""Names of one tensor in a module and in a checkpoint: torch.compile, DataParallel and DDP put parts of their own into them."""

from collections import defaultdict

WRAPPERS = ("_orig_mod", "module")  # parts of a name by torch.compile, and by DataParallel and DistributedDataParallel


def in_checkpoint(here, saved):
    """{name here: its name in the checkpoint}: the same one if it is there, else the only one that differs by wrappers alone."""
    here, saved = set(here), set(saved)
    ours, theirs = _by_unwrapped(here - saved), _by_unwrapped(saved - here)
    found = {name: name for name in here}
    for plain in ours.keys() & theirs.keys():
        if len(ours[plain]) == len(theirs[plain]) == 1:
            found[ours[plain][0]] = theirs[plain][0]
    return found


def _by_unwrapped(names):
    groups = defaultdict(list)
    for name in names:
        groups[".".join(part for part in name.split(".") if part not in WRAPPERS)].append(name)
    return groups
