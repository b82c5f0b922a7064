"""Checks of one tensor: what it holds, whether its numbers are there and can be differentiated."""

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = torch.float8_e4m3fn
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
# Tensors that are what they seem. Checks of every call look for these first: together they take microseconds.
PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter}
PLAIN_OR_NONE = {*PLAIN_TENSORS, type(None)}


def check_dense(name, shape, tensor):
    """Check that a value is a tensor with all of its numbers in memory."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor of shape {shape}, got {kind}")
    if tensor.is_meta:
        raise TypeError(f"{name} must have its numbers in memory, got a tensor on the device meta, which has shapes alone")
    # Tensors of torch.compile and vmap have no address.
    if type(tensor) not in PLAIN_TENSORS or torch.compiler.is_compiling() or _is_transformed(tensor):
        return
    stored, span = tensor.untyped_storage().nbytes(), tensor.numel()
    if span and not tensor.is_contiguous():
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span and stored < (tensor.storage_offset() + span) * tensor.element_size():
        raise ValueError(
            f"{name} must have its numbers in memory, got shape {tuple(tensor.shape)} over a storage of {stored} bytes"
        )


def check_read(name, shape, tensor):
    """Check that a value is a tensor whose numbers can be read now, by whoever has its address."""
    check_dense(name, shape, tensor)
    if isinstance(tensor, torch._subclasses.FakeTensor):
        raise TypeError(f"{name} must have its numbers in memory, got a FakeTensor, which has shapes alone")


def _is_transformed(tensor):
    """True if torch.func wraps the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_transforms(*tensors):
    """Raise inside torch.func.grad, vjp and jacrev: the operators' gradients are those of torch.autograd alone."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        while _is_transformed(tensor):
            if torch._C._functorch.is_gradtrackingtensor(tensor):
                raise RuntimeError(
                    "cosface_kernels has no gradient for torch.func (grad, vjp, jacrev): use backward(), torch.autograd.grad or "
                    "cosface_kernels.reference"
                )
            tensor = torch._C._functorch.get_unwrapped(tensor)


def check_one_kind(**tensors):
    """Check that all tensors are fake, or none. Fake tensors have shapes and no numbers."""
    if torch.compiler.is_compiling() or {type(tensor) for tensor in tensors.values()} <= PLAIN_OR_NONE:
        return
    given = [tensor for tensor in tensors.values() if tensor is not None]
    fake = [name for name, tensor in tensors.items() if isinstance(tensor, torch._subclasses.FakeTensor)]
    if fake and len(fake) < len(given):
        raise TypeError(f"all tensors must be fake, or none, got a FakeTensor for {' and '.join(fake)} alone")


def check_floats(name, shape, tensor, also=()):
    check_dense(name, shape, tensor)
    if tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in also:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_device(name, tensor, other, device):
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {other} ({device}), got {tensor.device}")


def check_integers(name, shape, tensor):
    check_dense(name, shape, tensor)
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
