"""Checks of the operators' arguments; every message carries the shapes."""

from torch import Tensor, bfloat16, float16, float32, float64

from sanctl_ops.window import Window

DTYPES = (float16, bfloat16, float32, float64)
PAD_MODES = ("reflect", "zero")


def check_image(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is a 4-d tensor of a floating-point type the operators know."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be (N, C, H, W), got {x.dim()}-d {_shape(x)}")
    check_dtype(name, x)


def check_poolable(name: str, x: Tensor) -> None:
    """Raise ValueError unless there are values, and 2 x 2 pixels of every image."""
    if x.numel() == 0 or min(x.shape[2:]) < 2:
        raise ValueError(f"{name} {_shape(x)} has no 2 x 2 values to pool")


def check_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is of a floating-point type the operators know."""
    if x.dtype not in DTYPES:
        known = ", ".join(_name(dtype) for dtype in DTYPES)
        raise ValueError(f"{name} {_shape(x)} is {_name(x.dtype)}; supported are {known}")


def check_alike(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Raise ValueError unless the two tensors have one dtype and lie on one device."""
    # The shapes are spelled out only in an error: torch.compile cannot print symbolic ones.
    if x1.dtype != x2.dtype:
        dtypes = f"{_name(x1.dtype)} and {_name(x2.dtype)}"
        raise ValueError(f"{name1} {_shape(x1)} and {name2} {_shape(x2)} differ in dtype: {dtypes}")
    check_device(name1, x1, name2, x2)


def check_device(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Raise ValueError unless the two tensors lie on one device."""
    if x1.device != x2.device:
        raise ValueError(
            f"{name1} {_shape(x1)} and {name2} {_shape(x2)} lie on different devices: "
            f"{x1.device} and {x2.device}"
        )


def check_window(window: Window, x: Tensor) -> None:
    """Raise ValueError unless the window is well-formed and fits the padded planes of x."""
    for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        value = getattr(window, name)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value} for {_shape(x)}")
    if window.pad_mode not in PAD_MODES:
        known = " or ".join(repr(mode) for mode in PAD_MODES)
        raise ValueError(f"pad_mode must be {known}, got {window.pad_mode!r} for {_shape(x)}")
    side = min(x.shape[-2:])
    if window.pad_mode == "reflect" and window.padding > 0 and window.padding >= side:
        raise ValueError(
            f"reflect padding of {window.padding} needs sides of at least {window.padding + 1} "
            f"pixels, got input {_shape(x)}"
        )
    if window.span > side + 2 * window.padding:
        raise ValueError(
            f"a window of {window.span} x {window.span} pixels (kernel_size {window.kernel_size}, "
            f"dilation {window.dilation}) is larger than the input {_shape(x)} "
            f"with padding {window.padding}"
        )


def check_weights(window: Window, x: Tensor, w: Tensor) -> None:
    """Raise ValueError unless w is (N, Cw, K*K, P) for the windows of x and Cw divides C."""
    batch, channels, height, width = x.shape
    out_height, out_width = window.output_size(height, width)
    taps, windows = window.taps, out_height * out_width
    if w.dim() != 4 or (w.shape[0], *w.shape[2:]) != (batch, taps, windows):
        raise ValueError(
            f"w must be (N, Cw, K*K, P) = ({batch}, Cw, {taps}, {windows}) "
            f"for x {_shape(x)}, got {_shape(w)}"
        )
    if w.shape[1] == 0 or channels % w.shape[1] != 0:
        raise ValueError(
            f"the {w.shape[1]} channels of w {_shape(w)} do not divide "
            f"the {channels} channels of x {_shape(x)}"
        )


def check_channel_values(name: str, values: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `values` has a known type and one value per channel, beside x."""
    if values.dim() != 1 or values.shape[0] != x.shape[1]:
        raise ValueError(
            f"{name} must be (C,) = ({x.shape[1]},) for x {_shape(x)}, got {_shape(values)}"
        )
    check_dtype(name, values)
    check_device("x", x, name, values)


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
