"""Do the fused optimisers touch the sampled rows alone, and those as torch.optim would with these rows as its whole table?"""

import copy

import pytest
import torch
from cases import make
from selection import pairs
from test_optim import NUM_CLASSES, SIZE, largest_error, path  # noqa: F401  a fixture

from cosface_kernels import FusedAdamW, FusedSGD, MarginSoftmaxLoss, sample_classes
from cosface_kernels.margins import CosFace, Softmax

OPTIONS = {
    FusedSGD: {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    FusedAdamW: {"lr": 0.01, "weight_decay": 0.1},
}
FORMS = {"cosines": {}, "bias": {"margin": Softmax(), "bias": True}, "3 centres": {"centers_per_class": 3}}
RATE = 0.4

pytestmark = pytest.mark.usefixtures("small_slabs")


def new(device, form="cosines", **options):
    torch.manual_seed(0)
    centers = FORMS[form].get("centers_per_class", 1)
    options = {"margin": CosFace(), "dtype": torch.float64, **FORMS[form], **options}
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES // centers, sample_rate=RATE, sample_seed=4, device=device, **options)
    with torch.no_grad():
        head.weight.normal_()
    return head


def batch(head, seed, rows=9):
    features, _, labels = make("uniform", rows, head.weight.shape[0] // head.centers_per_class, SIZE, seed=seed)
    return features.to(head.weight), labels.to(head.weight.device)


class RowByRow:
    """torch.optim on the rows that have a gradient, gathered into a small parameter, each with its own state; t counts steps."""

    def __init__(self, head, kind):
        self.parameters = list(head.parameters())
        self.kind = {FusedSGD: torch.optim.SGD, FusedAdamW: torch.optim.AdamW}[kind]
        self.options, self.steps = OPTIONS[kind], 0
        self.state = [{} for _ in self.parameters]

    def step(self):
        for parameter, state in zip(self.parameters, self.state, strict=True):
            gradient = parameter.grad.coalesce()
            (rows,) = gradient.indices()
            small = torch.nn.Parameter(parameter.detach()[rows])
            small.grad = gradient.values()
            optimizer = self.kind([small], **self.options)
            if state:
                optimizer.state[small] = {name: buffer[rows] for name, buffer in state.items()}
                optimizer.state[small]["step"] = torch.tensor(float(self.steps))
            optimizer.step()
            for name, values in optimizer.state[small].items():
                if values.dim():
                    state.setdefault(name, torch.zeros_like(parameter)).index_copy_(0, rows, values)
            with torch.no_grad():
                parameter.index_copy_(0, rows, small)
            parameter.grad = None
        self.steps += 1


@pytest.mark.parametrize(("kind", "form", "batches"), pairs([*OPTIONS], [*FORMS], [1, 3]))
def test_every_row_is_as_if_alone(kind, form, batches, device):
    """Over steps in which a row is sampled, not, and sampled again; three batches to a step are three samples."""
    ours = new(device, form)
    theirs = copy.deepcopy(ours)
    optimizer, oracle = kind(ours.parameters(), **OPTIONS[kind]), RowByRow(theirs, kind)
    for step in range(4):
        for part in range(batches):
            for head in (ours, theirs):
                head(*batch(head, 10 * step + part, rows=9 - part)).backward()
        assert ours.weight.grad is None and theirs.weight.grad.is_sparse
        optimizer.step()
        oracle.step()
    for one, other, state in zip(ours.parameters(), theirs.parameters(), oracle.state, strict=True):
        assert largest_error(one, other) < 1e-11
        for name, buffer in state.items():
            assert largest_error(optimizer.state[one][name], buffer) < 1e-11, name


@pytest.mark.parametrize("state_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("table_format", ["float32", "bfloat16"])
def test_other_rows_keep_their_bits(table_format, state_format, device, path):  # noqa: F811
    head = new(device, table_format=table_format, dtype=None)
    optimizer = FusedSGD(head.parameters(), **OPTIONS[FusedSGD], state_format=state_format)
    touched = torch.zeros(NUM_CLASSES, dtype=torch.bool, device=device)
    for step in range(3):
        features, labels = batch(head, step)
        sampled = sample_classes(labels, NUM_CLASSES, RATE, seed=4, step=step)
        head(features, labels).backward()
        before = [head.weight.detach().clone(), *(b.clone() for b in optimizer.state[head.weight].values() if b.dim())]
        optimizer.step()
        after = [head.weight.detach(), *(buffer for buffer in optimizer.state[head.weight].values() if buffer.dim())]
        others = torch.ones(NUM_CLASSES, dtype=torch.bool, device=device).index_fill_(0, sampled, False)
        for was, now in zip(before, after, strict=False):  # the first step has no state before
            assert torch.equal(was[others], now[others])
        assert (head.weight.detach()[sampled] != before[0][sampled]).any(1).all()
        touched |= ~others
    assert touched.sum() < NUM_CLASSES


def test_sampled_and_whole_in_one_step(device):
    """A step with a forward pass over all classes has a gradient of all."""
    ours = new(device)
    theirs = copy.deepcopy(ours)
    optimizer = FusedSGD(ours.parameters(), lr=0.5)
    for head in (ours, theirs):
        head(*batch(head, 0)).backward()
        head.eval()
        head(*batch(head, 1)).backward()
    optimizer.step()
    with torch.no_grad():
        theirs.weight -= 0.5 * theirs.weight.grad.to_dense()
    assert largest_error(ours.weight, theirs.weight) < 1e-12


def test_all_classes_sampled_is_the_whole(device, backend):
    heads = [new(device, dtype=torch.float32, backend=backend) for _ in range(2)]
    heads[1].sample_rate = 1.0
    heads[0].sample_rate = 1 - 1e-9
    for head in heads:
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        for step in range(2):
            head(*batch(head, step)).backward()
            optimizer.step()
    assert largest_error(heads[0].weight, heads[1].weight) < 2 * 64 * 2**-23
