"""Which tensors kernels take whose products are of halves."""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def obstacle(dtype: torch.dtype, what: str) -> str | None:
    """Return why the kernels of `what` do not take tensors of this dtype, or None if they do."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the kernels of {what} take float16, bfloat16 and float32, not {name}"
    # Halves have as many digits as TF32.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return (
            "float32 products are asked to be exact; allowing TF32, or mixed precision, lets the "
            f"kernels of {what} run"
        )
    return None
