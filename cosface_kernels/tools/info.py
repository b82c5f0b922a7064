"""The text for a bug report: versions, devices, and the backends that can be used here. Works on any machine."""

import importlib.metadata
import os
import platform

import torch

from ..ops import backends
from ..ops.backends import cpu_library
from ..ops.memory import total_memory
from ..training.environment import cpu_model
from ..version import __version__


def report():
    """The report, several lines of text."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    return "\n".join(["versions", *_versions(), "devices", *_devices(), "backends", *_backends(devices)])


def _versions():
    yield _line("cosface_kernels", __version__)
    yield _line("python", f"{platform.python_version()} on {platform.platform()}")
    yield _line("torch", torch.__version__)
    for name in ("triton", "numpy"):
        try:
            yield _line(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield _line(name, "not installed")


def _devices():
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    yield _line("cpu", f"{cpu_model()}, {threads}, {_cpu_memory()}, {capability}")
    yield _line("native kernels", cpu_library.unavailable() or f"{cpu_library.available()[0]}, {cpu_library.LIBRARY}")
    if cpu_library.why_not_amx():
        yield _line("", cpu_library.why_not_amx())
    if not torch.cuda.is_available():
        yield _line("cuda", "none" if torch.version.cuda else "none (this torch is built without CUDA)")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 1e9:.0f} GB"
        yield _line(f"cuda:{index}", f"{found.name}, {found.multi_processor_count} SMs, {memory}, sm_{found.major}{found.minor}")


def _backends(devices):
    for name in backends.NAMES:
        for device in devices:
            yield _line(f"{name} on {device.type}", why_unusable(name, device) or "usable")


def why_unusable(name, device, dtype=torch.float32):
    """`backends.unusable` for any installation."""
    try:
        return backends.unusable(name, device, dtype)
    except Exception as error:  # a broken installation may raise anything, and the report shows it
        return f"cannot be imported: {type(error).__name__}: {error}"


def _cpu_memory():
    return f"{total_memory(torch.device('cpu')) / 1e9:.0f} GB" if hasattr(os, "sysconf") else "memory unknown"


def _line(name, value):
    return f"  {name:<16} {value}"
