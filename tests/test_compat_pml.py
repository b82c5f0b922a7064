"""Are the losses of compat.pytorch_metric_learning those of the real package, and better where its docstring says so?

Theirs in float64 is the oracle, so a difference is a rounding of ours. Theirs is never given 16 bits where it would recast W.
"""

import copy
import pickle

import pytest

pytest.importorskip("pytorch_metric_learning.losses")

import torch
import torch.nn.functional as F
from cases import assert_as_accurate
from fresh import run as run_script
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils
from rounding import SIZE, assert_close, tolerance
from selection import slow_when
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels.compat import pytorch_metric_learning as compat
from cosface_kernels.ops import slabs

pytestmark = pytest.mark.usefixtures("small_slabs")

NUM_CLASSES = 300  # three slabs of 128, the last one short
NUM_ROWS = 24
NAMES = ("CosFaceLoss", "ArcFaceLoss", "SubCenterArcFaceLoss", "NormalizedSoftmaxLoss")
# Their defaults, and what their own tests use.
OPTIONS = [
    ("CosFaceLoss", {}),
    ("CosFaceLoss", {"margin": 0.25, "scale": 2}),
    ("CosFaceLoss", {"margin": 0.5, "scale": 30.0}),
    ("ArcFaceLoss", {}),
    ("ArcFaceLoss", {"margin": 30, "scale": 2}),
    ("ArcFaceLoss", {"margin": 60, "scale": 32}),
    ("SubCenterArcFaceLoss", {}),
    ("SubCenterArcFaceLoss", {"margin": 30, "scale": 8, "sub_centers": 2}),
    ("SubCenterArcFaceLoss", {"sub_centers": 1}),
    ("SubCenterArcFaceLoss", {"margin": 60, "sub_centers": 5}),
    ("NormalizedSoftmaxLoss", {}),
    ("NormalizedSoftmaxLoss", {"temperature": 0.1}),
    ("NormalizedSoftmaxLoss", {"temperature": 0.5}),
]


class Problem:
    """The same loss twice, ours and theirs in float64, a batch, and the rounding that may be between them."""

    def __init__(self, name, options, device, dtype=torch.float64, features_dtype=None, num_classes=NUM_CLASSES, seed=0):
        sizes = {"num_classes": num_classes, "embedding_size": SIZE}
        self.product_dtype = features_dtype or dtype
        self.ours = getattr(compat, name)(**sizes, **options)
        self.centers = self.ours.W.shape[1] // num_classes
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.ours.W.copy_(torch.randn(self.ours.W.shape, generator=generator))
        self.ours.to(device, dtype)
        self.theirs = getattr(losses, name)(**sizes, **copy.deepcopy(options)).to(device, torch.float64)
        self.theirs.load_state_dict(self.ours.state_dict())
        self.labels = torch.randint(num_classes, (NUM_ROWS,), generator=generator).to(device)
        self.features = self._rows(generator).to(device, features_dtype or dtype)
        if self.product_dtype.itemsize > 2:
            self.relative = self._tolerance()

    def _rows(self, generator):
        """Rows at every angle from their class; with sub-centres, rows whose nearest centre of each class is beyond doubt."""
        table = F.normalize(self.ours.W.detach().double().cpu().T)
        tries = 1 if self.centers == 1 else 20 if self.product_dtype.itemsize > 2 else 200
        noise = F.normalize(torch.randn(tries, NUM_ROWS, SIZE, generator=generator, dtype=torch.float64), dim=2)
        target = table[self.labels.cpu() * self.centers]
        rows = (noise + torch.linspace(-1, 1, NUM_ROWS)[:, None] * target) * torch.linspace(1, 3, NUM_ROWS)[:, None]
        if self.centers == 1:
            return rows[0]
        cosines = F.normalize(rows, dim=2) @ table.T
        first, second = cosines.unflatten(2, (-1, self.centers)).topk(2, dim=3).values.unbind(3)
        doubt = 8 * torch.finfo(self.product_dtype if self.product_dtype.itemsize > 2 else torch.bfloat16).eps
        clear = (first - second > doubt).all(2)
        assert clear.any(0).all()
        return rows[clear.int().argmax(0), torch.arange(NUM_ROWS)]

    def _tolerance(self):
        """A rounding of cos θ reaches an angular margin times |ψ'| and its gradient times |ψ''|, at most 1 + 1 / sin³ θ."""
        scale = getattr(self.ours, "scale", None) or 1 / self.ours.temperature
        relative = tolerance(self.product_dtype, float(scale))
        if "ArcFace" in type(self.ours).__name__:
            cosines = F.normalize(self.features.double()) @ F.normalize(self.theirs.W.detach(), dim=0)
            own = cosines.unflatten(1, (-1, self.centers)).amax(2).gather(1, self.labels[:, None])
            relative = relative * (1 + 1 / (1 - own**2).min() ** 1.5).item()
        return relative

    def check(self, *args, **kwargs):
        """Loss, dE and dW of both. Returns ours."""
        got = run(self.ours, self.features, self.labels, *args, **kwargs)
        wanted = run(self.theirs, self.features.double(), self.labels, *args, **kwargs)
        for what, tensor, exact in zip(("loss", "dE", "dW"), got, wanted, strict=True):
            assert tensor.shape == exact.shape
            assert_close(tensor, exact, self.relative, what)
        return got


def check_as_accurate(problems, ours, theirs, *args):
    """The rule of cases.py over several draws, with theirs in the same low precision as the plain reference: ours(problem) and
    theirs(problem) give (loss, dE, dW)."""
    triples = [(ours(p), run(p.theirs, p.features.double(), p.labels, *args), theirs(p)) for p in problems]
    # A CPU rounds a gradient's bfloat16 product once more.
    rounded = torch.finfo(torch.bfloat16).eps / 2
    for index, what in enumerate(("loss", "dE", "dW")):
        tensors = (
            torch.cat([torch.atleast_1d(result[index].cpu()) for result in results]) for results in zip(*triples, strict=True)
        )
        assert_as_accurate(what, *tensors, luck=False, rounded=rounded)


def run(loss_function, features, labels, *args, **kwargs):
    """(loss, dE, dW)."""
    features = features.detach().requires_grad_()
    loss_function.zero_grad()
    loss = loss_function(features, labels, *args, **kwargs)
    loss.backward()
    return loss.detach(), features.grad, loss_function.W.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_equals_theirs(name, options, dtype, device):
    problem = Problem(name, options, device, dtype)
    assert isinstance(problem.ours, getattr(losses, name))
    loss, *gradients = problem.check()
    assert [loss.dtype, *(gradient.dtype for gradient in gradients)] == 3 * [dtype]


def in_16_bits(name, options, device, features_dtype):
    """Several problems, so that an error is no accident. With sub-centres few classes, so that rows are found for which 16 bits
    leave no doubt about the nearest centre."""
    count, num_classes = (8, 5) if name == "SubCenterArcFaceLoss" else (3, NUM_CLASSES)
    return [Problem(name, options, device, torch.float32, features_dtype, num_classes, seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@slow_when(lambda options, dtype: options and dtype == torch.float16)
def test_16_bit_embeddings_leave_the_table_alone(name, options, dtype, device):
    """And are as exact as theirs, which computes in bfloat16 all the way (16 bits always mean bfloat16 here)."""

    def ours(problem):
        table, before = problem.ours.W, problem.ours.W.detach().clone()
        results = run(problem.ours, problem.features, problem.labels)
        assert [tensor.dtype for tensor in results] == [torch.float32, dtype, torch.float32]
        assert problem.ours.get_logits(problem.features).dtype == torch.float32
        if problem.centers > 1:
            problem.ours.get_outliers(problem.features, problem.labels)
        assert problem.ours.W is table and table.dtype == torch.float32 and torch.equal(table, before)
        return results

    def theirs(problem):
        loss = copy.deepcopy(problem.theirs)
        results = run(loss, problem.features.bfloat16(), problem.labels)
        assert loss.W.dtype == torch.bfloat16, "theirs no longer recasts: say so in the docstring"
        return results

    check_as_accurate(in_16_bits(name, options, device, dtype), ours, theirs)


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@slow_when(lambda options, features_dtype: options and features_dtype == torch.bfloat16)
def test_autocast(name, options, features_dtype, device):
    def under_autocast(loss, problem):
        features = problem.features.to(features_dtype).requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(features, problem.labels)
        value.backward()
        return value.detach(), features.grad, loss.W.grad

    def ours(problem):
        results = under_autocast(problem.ours, problem)
        assert [tensor.dtype for tensor in results] == [torch.float32, features_dtype, torch.float32]
        assert problem.ours.W.dtype == torch.float32
        return results

    check_as_accurate(
        in_16_bits(name, options, device, torch.bfloat16),
        ours,
        lambda problem: under_autocast(copy.deepcopy(problem.theirs).float(), problem),
    )


MINERS = {
    "none": lambda *batch: None,
    "pairs": miners.MultiSimilarityMiner(epsilon=0.5),
    "triplets": miners.TripletMarginMiner(margin=0.5, type_of_triplets="all"),
    "nothing found": lambda features, labels: 3 * (labels[:0],),
}


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("name", NAMES)
def test_miner_weights(name, miner, device):
    problem = Problem(name, {}, device)
    problem.labels[::2] = problem.labels[0]  # so that there are positives
    tuples = MINERS[miner](problem.features, problem.labels)
    if miner in ("pairs", "triplets"):
        assert len(tuples) == {"pairs": 4, "triplets": 3}[miner]
        weights = loss_and_miner_utils.convert_to_weights(tuples, problem.labels, torch.float64)
        assert len(weights.unique()) > 1, "the weights must differ to be seen"
    problem.relative = problem._tolerance()  # labels changed
    problem.check(tuples)


REDUCERS = {
    "mean": reducers.MeanReducer(),
    "sum": reducers.SumReducer(),
    "threshold": reducers.ThresholdReducer(low=4.0, high=40.0),
    "above zero": reducers.AvgNonZeroReducer(),
    "by class": reducers.ClassWeightedReducer(torch.linspace(1, 2, NUM_CLASSES)),
    "per anchor": reducers.PerAnchorReducer(),
    "multiple": reducers.MultipleReducers({"loss": reducers.ThresholdReducer(low=4.0)}),
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", NAMES)
def test_reducers(name, reducer, device):
    problem = Problem(name, {"reducer": copy.deepcopy(REDUCERS[reducer])}, device)
    problem.check()


@pytest.mark.parametrize("name", NAMES)
def test_do_nothing_reducer(name, device):
    problem = Problem(name, {"reducer": reducers.DoNothingReducer()}, device)
    got, wanted = (loss(problem.features, problem.labels) for loss in (problem.ours, problem.theirs))
    assert got.keys() == wanted.keys() == {"loss"}
    got, wanted = got["loss"], wanted["loss"]
    assert got["reduction_type"] == wanted["reduction_type"] and torch.equal(got["indices"], wanted["indices"])
    assert_close(got["losses"].detach(), wanted["losses"].detach(), problem.relative)


REGULARIZERS = {
    "weight": {"weight_regularizer": regularizers.LpRegularizer(p=1), "weight_reg_weight": 3.0},
    "weight, directions": {"weight_regularizer": regularizers.RegularFaceRegularizer(), "weight_reg_weight": 50},
    "embeddings": {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 2.0},
    "both, reduced": {
        "weight_regularizer": regularizers.CenterInvariantRegularizer(),
        "embedding_regularizer": regularizers.LpRegularizer(power=2),
        "reducer": reducers.ThresholdReducer(low=4.0),
    },
}


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_regularizers(name, regularizer, device):
    problem = Problem(name, REGULARIZERS[regularizer], device)
    assert problem.ours.sub_loss_names() == problem.theirs.sub_loss_names() != ["loss"]
    got = problem.check()
    alone = run(Problem(name, {}, device).ours, problem.features, problem.labels)
    assert got[0] > 1.01 * alone[0], "the regularizer must be seen"


def test_sparse_centers(device):
    options = {"weight_regularizer": regularizers.SparseCentersRegularizer(30, 3), "weight_reg_weight": 10, "sub_centers": 3}
    Problem("SubCenterArcFaceLoss", options, device, num_classes=30).check()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_both_ways(name, device):
    problem = Problem(name, {}, device)
    assert [*problem.ours.state_dict()] == ["W"]
    with torch.no_grad():
        problem.theirs.W.mul_(-1)
    problem.ours.load_state_dict(problem.theirs.state_dict())
    assert torch.equal(problem.ours.W, problem.theirs.W)
    problem.check()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, how, device):
    problem = Problem(name, {"collect_stats": True}, device)
    copied = how(problem.ours)
    assert torch.equal(copied(problem.features, problem.labels), problem.ours(problem.features, problem.labels))
    assert copied.W is not problem.ours.W


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_logits(name, options, dtype, device):
    problem = Problem(name, options, device, dtype)
    got, wanted = problem.ours.get_logits(problem.features), problem.theirs.get_logits(problem.features.double())
    assert got.shape == (NUM_ROWS, NUM_CLASSES) and got.dtype == dtype and got.requires_grad
    # A cosine of SIZE products and two norms, times the scale.
    assert (got - wanted).abs().max() <= 2 * wanted.abs().max() * SIZE * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_other_dtypes(name, device):
    problem = Problem(name, {}, device, torch.float32)
    wanted = problem.ours.get_logits(problem.features.bfloat16().float())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(problem.ours.get_logits(problem.features.bfloat16()), wanted)
    with pytest.raises(RuntimeError, match="dtype"):
        problem.theirs.get_logits(problem.features.bfloat16())
    assert problem.ours.get_logits(problem.features.double()).dtype == torch.float64


@pytest.mark.parametrize("sub_centers", [1, 2, 5])
@pytest.mark.parametrize("threshold", [60, 75, 100])
def test_outliers(sub_centers, threshold, device):
    problem = Problem("SubCenterArcFaceLoss", {"sub_centers": sub_centers}, device, num_classes=5)
    problem.labels[:2] = torch.tensor([4, 3])  # so that some class is absent, and rows do not come by class
    problem.labels[problem.labels == 2] = 1
    outliers, centers = problem.ours.get_outliers(problem.features, problem.labels, threshold=threshold)
    wanted, wanted_centers = problem.theirs.get_outliers(problem.features, problem.labels, threshold=threshold)
    assert 0 < len(outliers) < NUM_ROWS and torch.equal(outliers, wanted)
    present = problem.labels.unique()
    assert torch.equal(centers[:, present], wanted_centers[:, present]) and not centers[:, 2].any()
    alone = problem.ours.get_outliers(problem.features, problem.labels, threshold=threshold, return_dominant_centers=False)
    assert torch.equal(alone, outliers)


def test_no_outliers(device):
    problem = Problem("SubCenterArcFaceLoss", {}, device, num_classes=5)
    outliers, _ = problem.ours.get_outliers(problem.features, problem.labels, threshold=180)
    assert outliers.shape == (0,) and outliers.dtype == torch.int64
    problem.labels[:] = -1
    outliers, centers = problem.ours.get_outliers(problem.features, problem.labels)
    assert outliers.shape == (0,) and not centers.any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest result of any operator."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = (leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.elements = max(self.elements, *(tensor.numel() for tensor in tensors), 0)
        return result


@pytest.mark.parametrize("name", NAMES)
def test_no_logits_in_memory(name, device, monkeypatch):
    """N = 64 rows, so that N x C has four times the elements of a table of D = 16. What an operator of ours does inside is in
    test_memory.py."""
    monkeypatch.setattr(slabs, "KEPT_ANYWAY", 0)
    problem = Problem(name, {"sub_centers": 2} if name.startswith("Sub") else {}, device, torch.float32)
    features = problem.features.repeat(3, 1)[:64]
    labels = problem.labels.repeat(3)[:64]
    largest = []
    for loss in (problem.ours, problem.theirs):
        with Largest() as result:
            run(loss, features.to(loss.W.dtype), labels)
        largest.append(result.elements)
    columns = problem.ours.W.shape[1]
    assert largest[0] <= columns * SIZE < columns * 64 <= largest[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_ignored_rows(name, poison, device):
    """A batch with rows labelled -100 is the batch without them."""
    problem = Problem(name, {}, device)
    kept = torch.arange(NUM_ROWS, device=device) % 3 != 1
    wanted = run(problem.theirs, problem.features[kept], problem.labels[kept])
    problem.features[~kept], problem.labels[~kept] = poison, -100
    loss, dx, dw = run(problem.ours, problem.features, problem.labels)
    assert not dx[~kept].any()
    for what, tensor, exact in zip(("loss", "dE", "dW"), (loss, dx[kept], dw), wanted, strict=True):
        assert_close(tensor, exact, problem.relative, what)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn_from(name, device):
    problem = Problem(name, {}, device)
    problem.features[:] = torch.nan
    problem.labels[:] = -100
    assert not any(tensor.any() for tensor in run(problem.ours, problem.features, problem.labels))
    loss, *_ = run(problem.ours, problem.features[:0], problem.labels[:0])
    assert loss == 0
    assert problem.theirs(problem.features[:0], problem.labels[:0]).isnan(), "theirs no longer gives NaN"


@pytest.mark.parametrize("name", NAMES)
def test_labels(name, device):
    problem = Problem(name, {}, device, num_classes=100)
    wanted = run(problem.ours, problem.features, problem.labels)
    for dtype in (torch.uint8, torch.int8, torch.int32):
        for tensor, exact in zip(run(problem.ours, problem.features, problem.labels.to(dtype)), wanted, strict=True):
            assert torch.equal(tensor, exact)
    if device.type == "cpu":
        for label in (-1, 100):
            with pytest.raises(IndexError, match=f"is {label}, but"):
                problem.ours(problem.features, problem.labels.index_fill(0, torch.tensor([3]), label))


def test_extreme_rows(device):
    """A target cosine of exactly 1 or -1, and an embedding of zeros: where theirs is NaN, or of the order of 1e12."""
    problem = Problem("ArcFaceLoss", {}, device)
    unit = torch.zeros(SIZE, device=device, dtype=torch.float64)
    unit[3] = 1
    with torch.no_grad():
        for loss in (problem.ours, problem.theirs):
            loss.W[:, [5, 6]] = torch.stack([unit, -unit], 1)
    features = torch.stack([unit, unit, 0 * unit])
    labels = torch.tensor([5, 6, 7], device=device)
    loss, dx, dw = run(problem.ours, features, labels)
    assert loss.isfinite() and dx.isfinite().all() and dw.isfinite().all() and not dx[2].any()
    _, dx, _ = run(problem.theirs, features, labels)
    assert dx[:2].isnan().all() and dx[2].norm() > 1e9, "theirs changed: say so in the docstring"


def test_many_tuples_of_one_row(device):
    """65,520 is infinite in float16, and so is its weight, in theirs."""
    tuples = tuple(torch.zeros(count, dtype=torch.int64, device=device) for count in (65_520, 1, 1))
    problems = in_16_bits("CosFaceLoss", {}, device, torch.float16)
    check_as_accurate(
        problems,
        lambda problem: run(problem.ours, problem.features, problem.labels, tuples),
        lambda problem: run(copy.deepcopy(problem.theirs), problem.features.bfloat16(), problem.labels, tuples),
        tuples,
    )
    loss = problems[0].theirs(problems[0].features, problems[0].labels, tuples)
    assert not loss.isfinite(), "theirs changed: say so in the docstring"


@pytest.mark.parametrize("name", NAMES[:3])
def test_average_angle(name, device):
    problem = Problem(name, {"collect_stats": True}, device)
    problem.check()
    wanted = problem.theirs.avg_angle
    assert wanted > 1 and abs(problem.ours.avg_angle - wanted) <= problem.relative * wanted
    problem.ours(problem.features[:1].repeat(2, 1), torch.tensor([int(problem.labels[0]), -100], device=device))
    problem.theirs(problem.features[:1].double(), problem.labels[:1])
    assert abs(problem.ours.avg_angle - problem.theirs.avg_angle) <= problem.relative * wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "distance",
    [distances.CosineSimilarity(), distances.DotProductSimilarity(), distances.DotProductSimilarity(normalize_embeddings=False)],
    ids=["cosine", "normalised product", "product"],
)
def test_distances_of_normalized_softmax(distance, dtype, device):
    problem = Problem("NormalizedSoftmaxLoss", {"distance": distance, "temperature": 0.5}, device, dtype)
    if not distance.normalize_embeddings:  # a logit's rounding grows with the embedding's norm
        problem.relative *= problem.features.norm(dim=1).max().item()
    problem.check()
    got, wanted = problem.ours.get_logits(problem.features), problem.theirs.get_logits(problem.features.double())
    assert (got - wanted).abs().max() <= 2 * wanted.abs().max() * SIZE * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        ("NormalizedSoftmaxLoss", distances.LpDistance()),
        ("NormalizedSoftmaxLoss", distances.SNRDistance()),
        ("NormalizedSoftmaxLoss", distances.DotProductSimilarity(power=2)),
        ("CosFaceLoss", distances.CosineSimilarity(p=1)),
        ("ArcFaceLoss", distances.CosineSimilarity(power=2)),
        ("SubCenterArcFaceLoss", type("Own", (distances.CosineSimilarity,), {})()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_distances_are_refused(name, distance):
    with pytest.raises(ValueError, match=f"{name} computes cosines.*got {type(distance).__name__} with p="):
        getattr(compat, name)(num_classes=5, embedding_size=3, distance=distance)


@pytest.mark.parametrize("name", NAMES[:3])
def test_their_own_refusals_stay(name, device):
    with pytest.raises(AssertionError, match="CosineSimilarity"):
        getattr(compat, name)(num_classes=5, embedding_size=3, distance=distances.LpDistance())
    problem = Problem(name, {}, device)
    with pytest.raises(ValueError, match="labels are required"):
        problem.ours(problem.features)
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        problem.ours(problem.features, problem.labels, None, problem.features.clone(), problem.labels)


def test_sub_centers_by_position(device):
    assert compat.SubCenterArcFaceLoss(5, 3, sub_centers=4).W.shape == (3, 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_of_margin_and_scale(name, device):
    """Changed between steps, as they are in theirs."""
    problem = Problem(name, {}, device)
    for loss in (problem.ours, problem.theirs):
        if name == "NormalizedSoftmaxLoss":
            loss.temperature = 0.2
        else:
            loss.margin, loss.scale = 0.1, 20
    problem.check()


def test_multiple_losses(device):
    """Inside their wrapper, beside another loss."""
    problem = Problem("CosFaceLoss", {}, device)
    problem.labels[::2] = problem.labels[0]
    triplet = losses.TripletMarginLoss()
    got, wanted = (
        losses.MultipleLosses([loss, triplet], weights=[1.0, 0.5])(problem.features, problem.labels)
        for loss in (problem.ours, problem.theirs)
    )
    assert_close(got.detach(), wanted.detach(), problem.relative)


def test_without_the_package():
    assert run_script("""
import sys
sys.modules["pytorch_metric_learning"] = None
import cosface_kernels.compat
try:
    import cosface_kernels.compat.pytorch_metric_learning
except ImportError as error:
    print("pip install pytorch-metric-learning" in str(error))
""") == ["True"]


@pytest.mark.parametrize("method", ["modify_cosine_of_target_classes", "get_target_mask", "scale_logits"])
def test_a_subclass_whose_method_would_not_be_called_is_refused(method):
    own = type("Own", (compat.CosFaceLoss,), {method: lambda self, *arguments: arguments[0]})
    with pytest.raises(TypeError, match=rf"Own\.{method} would not be called"):
        own(num_classes=3, embedding_size=2)
    harmless = type("Own", (compat.CosFaceLoss,), {"get_default_reducer": compat.CosFaceLoss.get_default_reducer})
    assert harmless(num_classes=3, embedding_size=2).W.shape == (2, 3)
