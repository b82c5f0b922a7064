"""An optimiser's state by the names of its parameters, saved and restored without a step and without a copy.

torch.distributed.checkpoint.state_dict would first take a step with zero gradients where there is no state yet, C D numbers more,
and Optimizer.load_state_dict casts state to the parameter's dtype. Here a table's state is allocated as the checkpoint has it.
"""

import functools
import itertools

import torch

from ..distributed import dtensors


def by_name(optimizer):
    """{name: optimizer} of one optimiser, a dict of them, or a sequence of them."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = [optimizer]
    named = dict(optimizer) if isinstance(optimizer, dict) else {str(i): each for i, each in enumerate(optimizer)}
    for name, each in named.items():
        if not (isinstance(name, str) and isinstance(each, torch.optim.Optimizer)):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, or a dict or sequence of them, got {name!r}: {each!r}")
    return named


def flatten(prefix, optimizer, module):
    """({key: state tensor}, everything else of it as plain data)."""
    names = _names(prefix, optimizer, module)
    tensors, states = {}, {}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise ValueError(f"{prefix} has state of something that is not one of its parameters: {parameter!r}")
        if "interrupted" in state:
            raise RuntimeError(
                f"{prefix} was interrupted in a step, so the table is between two, and is not saved: see its step()"
            )
        name = names[parameter]
        own = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        for key, value in own.items():
            if value.layout != torch.strided:
                raise TypeError(
                    f"{_key(prefix, name, key)} is a sparse tensor, as the momentum of torch.optim.SGD is for a head with "
                    "sample_rate < 1, and is not saved: take FusedSGD, or momentum=0"
                )
            _check_not_local(_key(prefix, name, key), value, name, parameter)
        tensors |= {_key(prefix, name, key): value for key, value in own.items()}
        states[name] = {
            "on_cpu": {key: value.device.type == "cpu" for key, value in own.items()},
            "plain": {key: value for key, value in state.items() if key not in own},
        }
    groups = [
        {"names": [names[parameter] for parameter in group["params"]], "options": _options(group)}
        for group in optimizer.param_groups
    ]
    return tensors, {"kind": _kind(optimizer), "groups": groups, "states": states}


def is_flat(prefix, saved, metadata):
    """True if a value has the form of `flatten`'s second result, with its tensors among `metadata`'s."""
    try:
        names = {name for group in saved["groups"] for name in group["names"]}
        return all(isinstance(group["options"], dict) for group in saved["groups"]) and all(
            name in names
            and f"module/{name}" in metadata
            and isinstance(state["plain"], dict)
            and all(_key(prefix, name, key) in metadata for key in state["on_cpu"])
            for name, state in saved["states"].items()
        )
    except (AttributeError, KeyError, TypeError):
        return False


def prepare(prefix, optimizer, module, saved, metadata, grow, there):
    """Prepare to load what `flatten` saved: ({key: tensor to load into}, what `apply` takes, problems). Changes no optimiser.

    State that exists is loaded in place, other state is allocated; `metadata` is {key: TensorStorageMetadata} of the checkpoint,
    `grow` the names of parameters that may have more rows than there, whose state is zero. there: {name here: name in the
    checkpoint}.
    """
    names = {parameter: there.get(name, name) for parameter, name in _names(prefix, optimizer, module).items()}
    parameters = {name: parameter for parameter, name in names.items()}
    groups = [sorted(names[parameter] for parameter in group["params"]) for group in optimizer.param_groups]
    saved_groups = [sorted(group["names"]) for group in saved["groups"]]
    if {*itertools.chain(*groups)} != {*itertools.chain(*saved_groups)}:
        return {}, None, [f"{prefix} has parameter groups {saved_groups} in the checkpoint, {groups} here"]
    kind = saved.get("kind", _kind(optimizer))  # missing in the first checkpoints
    if kind != _kind(optimizer):
        return {}, None, [f"{prefix} is of another kind: {kind} in the checkpoint, {_kind(optimizer)} here"]
    tensors, states, problems = {}, {}, list(_refusals(prefix, optimizer, saved["groups"]))
    options = [_options_of(group, saved["groups"]) for group in groups]
    problems += [
        f"{prefix} has {group} in one group here, and in the checkpoint in groups whose options differ: a group here for each"
        for group, found in zip(groups, options, strict=True)
        if found is None
    ]
    for name, state in saved["states"].items():
        parameter = parameters[name]
        states[parameter] = dict(state["plain"])
        rows = metadata[f"module/{name}"].size[:1]
        for key, on_cpu in state["on_cpu"].items():
            where, found = _key(prefix, name, key), metadata[_key(prefix, name, key)]
            size, dtype = found.size, found.properties.dtype
            live = optimizer.state.get(parameter, {}).get(key)
            if name in grow and size and size[:1] == rows != parameter.shape[:1]:
                live, size = None, torch.Size([len(parameter), *size[1:]])
            if not isinstance(live, torch.Tensor):
                live = _zeros(parameter, size, dtype, on_cpu and not _wants_device(optimizer, parameter))
            elif (live.shape, live.dtype) != (size, dtype):
                problems.append(f"{where} is {dtype} {tuple(size)} in the checkpoint, {live.dtype} {tuple(live.shape)} here")
            tensors[where] = states[parameter][key] = live
    return tensors, (states, options), problems


def _options_of(group, saved_groups):
    """The options that all parameters of a group, by name, had in the checkpoint; None if they differ."""
    first, *others = [each["options"] for each in saved_groups if {*each["names"]} & {*group}] or [{}]
    return first if all(map(functools.partial(_are_equal, first), others)) else None


def _are_equal(one, other):
    """True for equal options, of which some may be tensors."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_equal(value, other[key]) for key, value in one.items())
    tensors = isinstance(one, torch.Tensor), isinstance(other, torch.Tensor)
    return torch.equal(one, other) if all(tensors) else not any(tensors) and one == other


def apply(optimizer, states, options):
    """Give an optimiser the states and the options of its groups that `prepare` found."""
    optimizer.state.clear()
    optimizer.state.update(states)
    for group, found in zip(optimizer.param_groups, options, strict=True):
        for key, value in found.items():
            live = group.get(key)
            group[key] = value.to(live.device) if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor) else value


def _kind(optimizer):
    """The name of an optimiser's rule: a fused optimiser loads the state of torch.optim's of the same rule, and the reverse."""
    return type(optimizer).__name__.removeprefix("Fused")


def _refusals(prefix, optimizer, groups):
    """Reasons why an optimiser that checks its options cannot take those of the checkpoint."""
    for group in groups if hasattr(optimizer, "check_options") else ():
        try:
            optimizer.check_options(optimizer.defaults | group["options"])
        except (TypeError, ValueError) as error:
            yield f"{prefix}: {error}"


def _zeros(parameter, size, dtype, on_cpu):
    """Zeros on the parameter's device, sharded as it is; for a number with on_cpu, on the CPU."""
    if dtensors.is_sharded(parameter) and size[:1] == parameter.shape[:1]:
        return dtensors.zeros(parameter, size, dtype)
    return torch.zeros(size, dtype=dtype, device="cpu" if on_cpu and not size else parameter.device)


def _wants_device(optimizer, parameter):
    """True if step counts must be on the parameter's device, as with torch.optim's `capturable` and `fused`."""
    (group,) = (group for group in optimizer.param_groups if any(parameter is each for each in group["params"]))
    return bool(group.get("capturable") or group.get("fused"))


def _names(prefix, optimizer, module):
    """{parameter: its name in module} of all parameters of an optimiser."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [tuple(parameter.shape) for parameter in own if parameter not in names]
    if strangers:
        raise ValueError(
            f"{prefix} has parameters of shapes {strangers} that are not in module: pass a module that holds all of them, "
            f"such as nn.ModuleDict({{'backbone': backbone, 'head': head}})"
        )
    return {parameter: names[parameter] for parameter in own}


def _check_not_local(where, value, name, parameter):
    """Raise for a plain tensor with one rank's rows: of plain tensors rank 0's are saved, so the other rows would be lost."""
    if not (dtensors.is_sharded(parameter) and parameter.dim() and value.dim()) or dtensors.is_sharded(value):
        return
    rows = len(dtensors.local(parameter))
    if len(value) == rows != len(parameter):
        raise ValueError(f"{where} has this rank's rows of {name} as a plain tensor; it must be a DTensor as {name} is")


def _options(group):
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _key(prefix, name, key):
    return f"{prefix}/{name}/{key}"
