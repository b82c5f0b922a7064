"""Steps that all ranks of the default process group take together, or one process alone if there is none."""

import pickle

import torch.distributed as dist


def together(step):
    """This rank's step(), or, on all ranks, the error of the first rank where it failed."""
    result, failure = None, None
    try:
        result = step()
    except Exception as error:
        failure = error
    failures = gather(failure and _portable(failure))
    for failed, error in enumerate(failures):
        if error is not None:
            error = failure if failed == rank() else error
            error.failed_rank = getattr(error, "failed_rank", failed)
            raise error
    return result


def _portable(error):
    """An error that other ranks can unpickle."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an exception's constructor may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")


def gather(value):
    """The values of all ranks."""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1
