"""Pytest plugin for a GPU: after an illegal access every later call of the process fails with the same message, so the process
ends with the test that did it. Under xdist that one is named, and a new worker has a new context.
"""

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    if not report.failed or not torch.cuda.is_initialized():  # as it isn't where the workers' reports come together
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"{report.nodeid} lost the GPU: {error}", returncode=3)
