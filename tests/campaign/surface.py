"""Which choice of which kind draws each public argument, and why some are left out; tests/test_campaign.py wants them all here.

A choice is "kind.name" of that kind's SPACE; "kind" alone where each of its cases has another, such as a folder.
"""

import inspect

import cosface_kernels
from cosface_kernels import MarginSoftmaxLoss, margins, sampling, theory

_LOSS = {
    **{name: f"losses.{name}" for name in ("features", "weight", "labels", "scale", "reduction", "memory_budget", "backend")},
    "ignore_index": "losses.labels",  # -100, or where they have no sign C
}
_BESIDE = {
    **{name: f"options.{name}" for name in ("label_smoothing", "class_weight", "negatives")},
    "return_statistics": "options.statistics",
}
_OF_MARGIN = {name: "options.margin" for name in ("margin", "bias", "normalize_features", "centers_per_class")}
_OF_CALL = {"classes": "options.sampled", "sample_correction": "options.sampled"}
_HEAD = {
    **{name: f"options.{name}" for name in ("scale", "reduction", "memory_budget", "backend", "hard_classes")},
    **{name: _BESIDE[name] for name in ("label_smoothing", "class_weight", "negatives")},
    "embedding_size": "losses.size",
    "num_classes": "options.classes",
    "learnable_scale": "options.scale",
    "ignore_index": "losses.labels",
    "table_format": "optimisers.table",
    "sample_rate": "optimisers.sample_rate",
    "sample_seed": "optimisers.seed",
    "sample_correction": "optimisers.sample_correction",
    "dtype": "options.weight",
    "device": "left out: there is one, the CPU; tests/test_gpu.py has the other",
    "placement": "left out: of the package's own subclasses, which shards draws",
}
_SHARDED = {name: choice for name, choice in _HEAD.items() if name != "placement"} | {
    **{name: f"shards.{name}" for name in ("reduction", "hard_classes", "ddp_average", "sample_rate", "sample_correction")},
    **{name: "shards.beside" for name in ("label_smoothing", "class_weight", "negatives")},
    **{"num_classes": "shards.classes", "sample_seed": "shards.seed", "table_format": "shards.dtype", "dtype": "shards.dtype"},
    **{name: "shards.margin" for name in ("margin", "bias", "normalize_features", "centers_per_class")},
    "learnable_scale": "left out: tests/sharded_losses.py steps one",
    "ignore_index": "left out: -100 alone here; tests/sharded_losses.py has those that are a class's place",
    "mesh": "left out: all ranks here; tests/test_sharded.py has others",
}
_SHARDED |= {
    name: "left out: the loops are those of one process, which losses and options draw" for name in ("memory_budget", "backend")
}
_SHARDED |= {
    "embedding_size": "left out: 16 here, which losses draws",
    "scale": "left out: the margin's own here, which options draws",
}
_OPTIMIZER = {
    "params": "left out: one group of one head; tests/test_optim.py has several",
    **{name: f"optimisers.{name}" for name in ("lr", "weight_decay", "maximize", "max_row_norm", "seed")},
    "state_format": "optimisers.state",
}
_CHECKPOINT = {"folder": "identities", "module": "identities.margin", "optimizer": "identities.optimizer"}
_CALL = {"features": "options.features", "labels": "options.positives"}

ARGUMENTS = {
    "cosine_lse": {name: choice for name, choice in _LOSS.items() if name != "reduction"} | {"return_largest": "losses.largest"},
    "cosface_loss": _LOSS | _BESIDE | _OF_CALL | {"margin": "losses.m"},
    "margin_softmax_loss": _LOSS
    | _BESIDE
    | _OF_CALL
    | _OF_MARGIN
    | {"scale": "options.scale", "label_weights": "options.positives"},
    "MarginSoftmaxLoss": _HEAD | _OF_MARGIN,
    "MarginSoftmaxLoss.forward": _CALL
    | {"return_statistics": "options.statistics", "label_weights": "options.positives"}
    | {"others": "left out: a mistake, which it says", "named": "left out: a mistake, which it says"},
    "MarginSoftmaxLoss.logits": {"features": "identities.rows"},
    "MarginSoftmaxLoss.topk": {"features": "identities.rows", "k": "identities.classes"},
    "MarginSoftmaxLoss.confusions": {"k": "identities.classes"},
    "MarginSoftmaxLoss.own_cosines": {"features": "identities.rows", "labels": "identities.rows"},
    "MarginSoftmaxLoss.dominant_centers": {"cosines": "identities.rows", "labels": "identities.rows"},
    "MarginSoftmaxLoss.grow": {"count": "identities.seed", "optimizer": "identities.optimizer"},
    "MarginSoftmaxLoss.remove": {"ids": "identities.seed", "optimizer": "identities.optimizer"},
    "MarginSoftmaxLoss.draw": {"rows": "left out: what a subclass overrides; grow calls it"},
    "MarginSoftmaxLoss.reset_parameters": {},
    "CosFaceLoss": {name: choice for name, choice in _HEAD.items() if name != "placement"}
    | {"margin": "losses.m"}
    | dict.fromkeys(("normalize_features", "centers_per_class"), "left out: options draws the class for any margin"),
    "ShardedCosFaceLoss": dict.fromkeys(_SHARDED.keys() - {"bias"}, "left out: shards draws the class for any margin"),
    "ShardedMarginSoftmaxLoss": _SHARDED,
    "FusedSGD": _OPTIMIZER | {name: f"optimisers.{name}" for name in ("momentum", "nesterov")},
    "FusedAdamW": _OPTIMIZER | {name: f"optimisers.{name}" for name in ("betas", "eps")},
    "sample_classes": {"labels": "options.hard_classes", "num_classes": "options.classes", "seed": "options.seed"}
    | {"rate": "left out: one rate, as options has it", "step": "left out: 0 here; optimisers and identities take several"},
    "sampling.correction": {"classes": "options.sampled", "certain": "options.hard_classes", "num_classes": "options.classes"},
    "save_checkpoint": _CHECKPOINT | {name: "identities" for name in ("extra", "keep", "overwrite")},
    "load_checkpoint": _CHECKPOINT | {name: "identities" for name in ("grow", "strict")},
    "latest_checkpoint": {"parent": "identities"},
    "theory.min_scale": {"num_classes": "hostile", "probability": "hostile"},
    "theory.max_margin": dict.fromkeys(
        ("num_classes", "embedding_size"), "left out: a formula of the paper, by tests/test_theory.py"
    ),
    "theory.suggest": dict.fromkeys(("num_classes", "embedding_size"), "hostile"),
}
NO_CALLS = {  # of __all__
    "CorruptCheckpointError": "an error, which files wants",
    "Statistics": "a result",
    "__version__": "a text",
    "margins": "drawn_margins",
    "reference": "the oracle of losses",
    "theory": "its functions",
}


def parameters(name):
    """{argument} of a public name, those of **options spelt out."""
    owner = {"sampling": sampling, "theory": theory}.get(name.split(".")[0], cosface_kernels)
    function = owner
    for part in name.removeprefix("sampling.").removeprefix("theory.").split("."):
        function = getattr(function, part)
    found = {*inspect.signature(function).parameters} - {"self"}
    if "options" in found:  # of a subclass of MarginSoftmaxLoss, which has all of them
        found |= {*inspect.signature(MarginSoftmaxLoss).parameters}
        found -= {"options", "self", "placement"} | ({"bias"} if "CosFace" in name else set())
    return found


def names():
    """Every public name that is called."""
    methods = (name for name in vars(MarginSoftmaxLoss) if not name.startswith("_") and name != "extra_repr")
    methods = {f"MarginSoftmaxLoss.{name}" for name in methods if callable(getattr(MarginSoftmaxLoss, name))}
    formulas = {f"theory.{name}" for name in ("min_scale", "max_margin", "suggest")}
    return {*cosface_kernels.__all__} - NO_CALLS.keys() | methods | formulas | {"sampling.correction"}


def public_margins():
    bases = margins.Margin, margins.HardNegatives
    return {each for each in vars(margins).values() if inspect.isclass(each) and issubclass(each, bases) and each not in bases}
