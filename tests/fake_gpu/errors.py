"""Pytest plugin for a GPU that is not there: comparisons never fail, so that a test which fails met an error of Python or C++.

    make test-fake-gpu-suite

Kernels run nowhere; without PyTorch's cache of memory every number that they would write is 0. So that sizes are possible ones, a
mask of a test is all true, `unique` is a CPU's, and a float that is read is 1 where it is 0. `assert` computes what follows it
and goes on, in the tests alone: PyTorch's own stay as they are. A test that needs one more number ends as "xfailed", and says
which.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import library

TESTS = Path(__file__).parents[1]
# {how a test's name begins: what garbage decides in it}
DECIDED = {
    "test_sample": "the count of drawn classes",
    "test_correction": "log(M - 1) of M = 1 class",
    "test_training_beside_a_fused_optimiser": "a learnt scale of 0",
    "test_compile[cuda]": "a learnt scale of 0",
    "test_wrong_classes": "the order of the classes",
    "test_label_that_takes_no_part": "the order of the classes",
    "test_each_row_has_the_numbers_of_its_class[cuda-MagFace]": "whether l_a < u_a",
    "test_identities_that_come_and_go": "the count of classes that stay",
    "test_class_weight_of_a_head": "the count of classes that stay",
}


class Computed(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.copy_location(ast.Expr(node.test), node)


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        return compile(Computed().visit(ast.parse(self.get_data(self.path))), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and spec.origin and TESTS in Path(spec.origin).parents:
            return importlib.util.spec_from_file_location(spec.name, spec.origin, loader=Loader(spec.name, spec.origin))
        return None


def gradients(function, inputs, **options):
    """Compute what gradcheck compares, once."""
    results = function(*inputs)
    results = [results] if isinstance(results, torch.Tensor) else results
    torch.autograd.grad(results, [each for each in inputs if each.requires_grad], [torch.ones_like(each) for each in results])


def nonzero(mask):
    frame = sys._getframe().f_back  # None in the thread of a backward
    while frame and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    ours = frame and TESTS not in Path(frame.f_code.co_filename).parents
    return (mask.cpu() if ours else torch.ones(mask.shape, dtype=torch.bool)).nonzero().to(mask.device)


def _unique2(tensor, *options):
    return tuple(each.to(tensor.device) for each in torch._unique2(tensor.cpu(), *options))


def _local_scalar_dense(tensor):
    value = tensor.cpu().item()
    return value or (1.0 if isinstance(value, float) else value)


def opcheck(*arguments, check=library.opcheck, **keywords):
    """Without test_schema, which looks for arguments that changed by comparing their numbers."""
    check(*arguments, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), **keywords)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    why = next((why for test, why in DECIDED.items() if item.name.startswith(test)), None)
    if call.excinfo and call.excinfo.errisinstance(pytest.fail.Exception):
        why = "whether it raises"
    if report.failed and why:
        report.outcome, report.wasxfail = "skipped", f"a number decides: {why}"
    return report


sys.meta_path.insert(0, Finder())
torch.testing.assert_close = lambda *arguments, **keywords: None
torch.autograd.gradcheck = gradients
library.opcheck = opcheck
ON_CUDA = library.Library("aten", "IMPL")
for function in (nonzero, _unique2, _local_scalar_dense):
    ON_CUDA.impl(function.__name__, function, "CUDA")
