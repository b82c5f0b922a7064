import copy

import pytest
import torch

from cosface_kernels import cosface_loss
from cosface_kernels.ops import page_pool
from cosface_kernels.ops.memory import UNASKED_SHARE

CPU = torch.device("cpu")
ROWS = page_pool.LARGE // (4 * 256) + 64


@pytest.fixture(autouse=True)
def nothing_spare():
    page_pool.release()
    yield
    page_pool.release()


def large(rows=ROWS):
    return page_pool.empty((rows, 256), torch.float32, CPU)


def test_memory_is_lent_again_only_when_no_tensor_is_over_it():
    tensor = large().fill_(1)
    address, row = tensor.data_ptr(), tensor[5:6]
    del tensor
    other = large().fill_(2)
    assert other.data_ptr() != address
    assert bool((row == 1).all())
    del row
    assert large(ROWS - 7).data_ptr() == address


def test_dtype_shape_and_device_are_as_asked():
    low = page_pool.empty((3, page_pool.LARGE), torch.bfloat16, CPU)
    assert (low.dtype, low.shape, low.is_contiguous()) == (torch.bfloat16, (3, page_pool.LARGE), True)
    assert page_pool.empty((3, page_pool.LARGE), torch.bfloat16, torch.device("meta")).device.type == "meta"
    with torch.device("meta"):
        assert page_pool.empty((3, page_pool.LARGE), torch.bfloat16, CPU).fill_(1)[2, 5] == 1
    small = page_pool.empty((4, 0), torch.float64, CPU)
    assert small.resize_(5, 7).shape == (5, 7)  # torch's own


def test_a_block_more_than_a_quarter_larger_is_not_taken():
    address = large(5 * ROWS // 4 + 1).data_ptr()
    assert large().data_ptr() != address
    # A size that none fits replaces those that were kept: sizes have changed.
    assert [block.bytes.nbytes for block in page_pool._spare] == [ROWS * 1024]


def test_the_smallest_that_fits_is_taken():
    first, second = large(ROWS + 64), large(ROWS + 32)
    address = second.data_ptr()
    del first, second
    assert large().data_ptr() == address


def test_what_is_spare_has_a_limit(monkeypatch):
    monkeypatch.setattr(page_pool, "total_memory", lambda device: UNASKED_SHARE * 3 * ROWS * 1024)
    tensors = [large() for _ in range(5)]
    del tensors
    assert len(page_pool._spare) == 3


def test_the_limit_holds_for_blocks_that_threads_give_back_at_once(monkeypatch):
    first, others = large(), [large()]

    def total_memory(device):
        others.clear()  # as another thread may, between the sum and what is done with it
        return UNASKED_SHARE * ROWS * 1024

    monkeypatch.setattr(page_pool, "total_memory", total_memory)
    del first
    assert not others and len(page_pool._spare) == 1


def test_copies_and_shared_memory_own_theirs(tmp_path):
    large(ROWS + 200)
    tensor = large().fill_(1)  # in a block that is larger
    copied = copy.deepcopy(tensor)
    torch.save(tensor, tmp_path / "tensor")
    assert (tmp_path / "tensor").stat().st_size < tensor.nbytes + 10_000
    tensor.share_memory_()
    large().fill_(3)
    for own in (tensor, copied, torch.load(tmp_path / "tensor")):
        assert bool((own == 1).all())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_gradient_that_is_kept_is_not_written_again(backend):
    classes = ROWS
    features, weight = torch.randn(8, 256), torch.randn(classes, 256, requires_grad=True)

    def gradient(labels):
        loss = cosface_loss(features, weight, labels, backend=backend)
        return torch.autograd.grad(loss, weight)[0]

    first = gradient(torch.arange(8))
    before, address = first.clone(), first.data_ptr()
    second = gradient(torch.arange(8) + 100)
    assert torch.equal(first, before)
    del first, second
    again = gradient(torch.arange(8))
    assert again.data_ptr() == address  # so it was memory that held other numbers
    assert torch.equal(again, before)


@pytest.mark.parametrize("spare", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile_of_a_large_table(spare, monkeypatch):
    """Traced tensors have shapes and no memory for the pool."""
    monkeypatch.setattr(page_pool, "LARGE", 1000)
    torch._dynamo.reset()
    features, labels = torch.randn(6, 16), torch.arange(6)
    weight = torch.randn(300, 16, requires_grad=True)
    if spare:
        cosface_loss(features, weight, labels).backward()
        weight.grad = None
        assert page_pool._spare
    torch.compile(cosface_loss, fullgraph=True, backend="aot_eager")(features, weight, labels).backward()
    found, weight.grad = weight.grad, None
    cosface_loss(features, weight, labels).backward()
    assert torch.equal(found, weight.grad)
