"""What autocast makes of what a module is given."""

import torch
from torch import Tensor


def convolved_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which x is convolved, under autocast or not."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
