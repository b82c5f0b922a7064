"""Does a test run the attention-shaped kernels where they serve its calls? Is it marked selection.slab_loop only where not?"""

import pytest


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def asked(item):
    """Whether a test's fixture `backend` asks for kernels that attend."""
    return parameters(item).get("backend") == "attend"


def record(item, monkeypatch, name):
    """From now on keep for `check` what triton_attend's function `name`, which decides whether kernels attend, answers."""
    from cosface_kernels.ops.backends import triton_attend

    item.attended, decide = [], getattr(triton_attend, name)

    def recorded(*arguments, **keywords):
        answer = decide(*arguments, **keywords)
        item.attended.append(bool(answer))
        return answer

    monkeypatch.setattr(triton_attend, name, recorded)


def check(item):
    """Fail a case "attend" in which no kernel attended, and a case of the slab loop alone that they would serve."""
    attended = getattr(item, "attended", None)
    if attended is None:
        return
    if asked(item) and not any(attended):
        pytest.fail("no kernel attends here: mark the test selection.slab_loop, or slab_loop_when for some of its cases")
    if not asked(item) and any(attended):
        pytest.fail("kernels that attend serve this test: take off its mark slab_loop, or narrow slab_loop_when")
