"""Where operations written out for PyTorch's eager mode on a CPU serve; elsewhere its own forms do."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors of one dtype, float32 or float64, and nothing transforms or casts them."""
    dtype = tensors[0].dtype
    plain = dtype in (torch.float32, torch.float64) and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == dtype for x in tensors
    )
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return plain and not (transformed or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
