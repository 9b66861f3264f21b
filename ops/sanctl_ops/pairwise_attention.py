"""Pairwise self-attention as one operator: relation, weights and aggregation."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sanctl_ops import pairwise_formulas as formulas
from sanctl_ops.attention import Attention, Norm, dense
from sanctl_ops.attention_checks import check_images, check_pairwise_layers
from sanctl_ops.backend import choose_backend, runs_kernels
from sanctl_ops.kernels import pairwise as kernels
from sanctl_ops.kernels.pairwise_layout import Layout, layout_of
from sanctl_ops.kernels.pairwise_saved import Packed, Planes, Saved
from sanctl_ops.kernels.pairwise_tiles import obstacle
from sanctl_ops.window import Window, accumulation_dtype, empty_planes, plane_format


def pairwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    bias2: Tensor,
    kernel_size: int,
) -> Attention:
    """Weigh the values around every pixel by a function of differences of query and key.

    For tap j of the K x K window around pixel i, whose borders are mirrored, and with the position
    joined behind the channels of query and key:

        relation = query_i - key_nbr(i, j)                         (rel + 2 channels)
        hidden = relu(norm2(weight1 relu(norm1(relation))))        (rel channels)
        P = softmax over j of (weight2 hidden + bias2)             (Cw channels)
        out[c, i] = sum_j P[c % Cw, j, i] * value[c, nbr(i, j)]

    This is pairwise self-attention with the subtraction relation (Zhao et al., CVPR 2020, sections
    3.1 and 4.1). Nothing with rel * K * K values per pixel is stored. Sums of float16 and bfloat16
    values are kept in float32 and those for statistics in float64; two runs give the same bits.
    Kernels multiply halves: they take float32 planes only where torch allows TF32, whose mantissas
    are as short, for products of matrices (`torch.backends.cuda.matmul`). Results are float32 then,
    with errors of about 1e-3.

    Args:
        query: (N, rel, H, W), float16, bfloat16, float32 or float64, in any memory layout, as all
            planes.
        key: (N, rel, H, W).
        value: (N, C, H, W).
        position: (1, 2, H, W), the same for all images.
        norm1: of rel + 2 channels.
        weight1: (rel, rel + 2).
        norm2: of rel channels.
        weight2: (Cw, rel), where Cw divides C.
        bias2: (Cw,). It changes nothing, as it cancels in the softmax, and its gradient is zero.
        kernel_size: taps per side of the window, K, odd.

    Returns:
        The output and the statistics that the normalisations went by. Gradients flow from the
        output to all tensors but the running statistics; those of query, key and value are
        channels_last where these are, else contiguous.

    Raises:
        ValueError: a tensor is of another shape or type than said above, the planes differ in
            dtype, devices differ, one of mean and variance is missing, kernel_size is even or below
            1, or the sides are not larger than K // 2.
        BackendError: the CuPy kernels are asked for by name and cannot run on query's device.
    """
    check_images(query, key, value, kernel_size)
    check_pairwise_layers(query, position, norm1, weight1, norm2, weight2, bias2, value)
    first, second = tuple(norm1), tuple(norm2)
    results = _pairwise(
        query, key, value, position, *first, weight1, *second, weight2, bias2, kernel_size
    )
    return Attention(*results[:5])


def _window(kernel_size: int) -> Window:
    return Window(kernel_size, 1, kernel_size // 2, 1, "reflect")


def pairwise_attention_obstacle(
    query: Tensor, value: Tensor, weight_channels: int, kernel_size: int
) -> str | None:
    """Say why no kernels of its own run `pairwise_attention` on such tensors; None if they do.

    Without them the operator is computed by formulas in torch, some images at a time. So it is with
    float32 planes where TF32 is not allowed, and with float64 ones.

    Args:
        query: (N, rel, H, W).
        value: (N, C, H, W).
        weight_channels: Cw, the rows of weight2.
        kernel_size: taps per side of the window, K.

    Raises:
        BackendError: the CuPy kernels are asked for by name and cannot run on query's device.
    """
    channels = value.shape[1]
    return _obstacle(
        query.device, query.dtype, *query.shape[1:], weight_channels, channels, kernel_size
    )


# torch.compile asks once for sizes, and need not look into it; it may see any number of images.
@torch.compiler.assume_constant_result
def _obstacle(
    device: torch.device,
    dtype: torch.dtype,
    relation: int,
    height: int,
    width: int,
    weight_channels: int,
    channels: int,
    kernel_size: int,
) -> str | None:
    choice = choose_backend(device)
    if choice.name == "torch":
        return choice.reason
    sizes = (height, width, relation, weight_channels, channels, kernel_size)
    return obstacle(dtype, Layout(1, *sizes))


def _layout(query: Tensor, value: Tensor, weight2: Tensor, kernel_size: int) -> Layout | None:
    """Return the layout for the kernels, or None where the formulas do the work."""
    layout = layout_of(query, value, weight2.shape[0], kernel_size)
    runs = runs_kernels(query.device) and obstacle(query.dtype, layout) is None
    return layout if runs else None


# How many of Saved's tensors are empty where there are no kernels: all but the Gram matrix.
NOT_WITHOUT_KERNELS = 8
# The output, four statistics, and the tensors of Saved.
Results = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]


# Inductor keeps the strides of what it hands over: the kernels are for channels_last.
@torch.library.custom_op(
    "sanctl::pairwise_attention", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
def _pairwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    norm_weight1: Tensor,
    norm_bias1: Tensor,
    running_mean1: Tensor | None,
    running_variance1: Tensor | None,
    eps1: float,
    weight1: Tensor,
    norm_weight2: Tensor,
    norm_bias2: Tensor,
    running_mean2: Tensor | None,
    running_variance2: Tensor | None,
    eps2: float,
    weight2: Tensor,
    bias2: Tensor,
    kernel_size: int,
) -> Results:
    """Return the output, the four statistics, and what kernels.Saved consists of.

    Without kernels, only the Gram matrix among the latter has elements.
    """
    norm1 = Norm(norm_weight1, norm_bias1, running_mean1, running_variance1, eps1)
    norm2 = Norm(norm_weight2, norm_bias2, running_mean2, running_variance2, eps2)
    layout = _layout(query, value, weight2, kernel_size)
    if layout is not None:
        planes = Planes(query, key, position)
        found = kernels.forward(planes, value, norm1, weight1, norm2, weight2, layout)
        return cast(Results, (found[0], *found[1], *_listed(found[2])))
    window = _window(kernel_size)
    q, k = formulas.join(query, position), formulas.join(key, position)
    mean1, variance1, mean2, variance2 = norm1.mean, norm1.variance, norm2.mean, norm2.variance
    if mean1 is None or variance1 is None:
        mean1, variance1 = formulas.statistics1(q, k, window)
    folded1 = _normalised(norm1, mean1, variance1)
    gram = q.new_zeros(q.shape[1] + 1, q.shape[1] + 1, dtype=torch.float64)
    if mean2 is None or variance2 is None:
        gram = formulas.gram(q, k, folded1, window)
        mean2, variance2 = formulas.statistics2(gram, weight1)
    layers = formulas.Layers(folded1, weight1, _normalised(norm2, mean2, variance2), weight2)
    out = empty_planes(value).copy_(formulas.forward(q, k, value, layers, window))
    dtype = accumulation_dtype(query.dtype)
    mean1, variance1, mean2, variance2 = (
        x.to(dtype, copy=True) for x in (mean1, variance1, mean2, variance2)
    )
    nothing = (query.new_empty(0) for _ in range(NOT_WITHOUT_KERNELS))
    return cast(Results, (out, mean1, variance1, mean2, variance2, gram, *nothing))


def _normalised(
    norm: Norm, mean: Tensor, variance: Tensor, by_batch: bool = True
) -> formulas.Normalised:
    return formulas.normalised(norm.weight, norm.bias, mean, variance, norm.eps, by_batch)


@_pairwise.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    dtype, rel = accumulation_dtype(query.dtype), query.shape[1]
    mean1, variance1, mean2, variance2 = (
        query.new_empty(channels, dtype=dtype) for channels in (rel + 2, rel + 2, rel, rel)
    )
    weight2, _, kernel_size = arguments[11:]
    layout = _layout(query, value, weight2, kernel_size)
    gram = query.new_empty(rel + 3, rel + 3, dtype=torch.float64)
    saved = (gram, *(query.new_empty(0) for _ in range(NOT_WITHOUT_KERNELS)))
    if layout is not None:
        saved = _listed(kernels.empty_saved(query, layout))
    return empty_planes(value), mean1, variance1, mean2, variance2, *saved


def _listed(saved: Saved) -> tuple[Tensor, ...]:
    packed = (saved.packed.first, saved.packed.second, saved.packed.back)
    rest = (saved.logits, saved.log_sums, saved.most_value)
    return saved.gram, saved.folded, saved.affine, *packed, *rest


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "sanctl::pairwise_attention_backward",
    mutates_args=(),
    tags=(torch.Tag.needs_fixed_stride_order,),
)
def _pairwise_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    norm_weight1: Tensor,
    norm_bias1: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    eps1: float,
    by_batch1: bool,
    weight1: Tensor,
    norm_weight2: Tensor,
    norm_bias2: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    eps2: float,
    by_batch2: bool,
    weight2: Tensor,
    out: Tensor,
    gram: Tensor,
    folded: Tensor,
    affine: Tensor,
    first: Tensor,
    second: Tensor,
    back: Tensor,
    logits: Tensor,
    log_sums: Tensor,
    most_value: Tensor,
    kernel_size: int,
) -> Gradients:
    """Return the gradients of query, key, value, position, norm1, weight1, norm2 and weight2."""
    norm1 = Norm(norm_weight1, norm_bias1, mean1, variance1, eps1)
    norm2 = Norm(norm_weight2, norm_bias2, mean2, variance2, eps2)
    # What the forward pass has saved decides: TF32 may have been allowed or forbidden since.
    if folded.numel() > 0:
        layout = layout_of(query, value, weight2.shape[0], kernel_size)
        folded, logits, log_sums = (x.contiguous() for x in (folded, logits, log_sums))
        packed = Packed(first, second, back)
        saved = Saved(gram, folded, affine, packed, logits, log_sums, most_value)
        planes = Planes(query, key, position)
        norms, by_batch = (norm1, weight1, norm2), (by_batch1, by_batch2)
        found = kernels.backward(grad, planes, value, out, *norms, by_batch, saved, layout)
    else:
        folded1 = _normalised(norm1, mean1, variance1, by_batch1)
        folded2 = _normalised(norm2, mean2, variance2, by_batch2)
        layers = formulas.Layers(folded1, weight1, folded2, weight2)
        q, k = formulas.join(query, position), formulas.join(key, position)
        found = formulas.backward(grad, q, k, value, layers, gram, _window(kernel_size))
    grad_query, grad_key, grad_value = (
        x.to(query.dtype).contiguous(memory_format=plane_format(like))
        for x, like in ((found.query, query), (found.key, key), (found.value, value))
    )
    tiny = (found.position, *found.norm1, found.weight1, *found.norm2, found.weight2)
    inputs = (position, norm_weight1, norm_bias1, weight1, norm_weight2, norm_bias2, weight2)
    rest = [dense(x, like.dtype) for x, like in zip(tiny, inputs, strict=True)]
    return (
        *(grad_query, grad_key, grad_value, rest[0], rest[1]),
        *(rest[2], rest[3], rest[4], rest[5], rest[6]),
    )


@_pairwise_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, position: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    weight_n1, bias_n1, *_ = arguments
    weight1, weight_n2, bias_n2, *_ = arguments[6:]
    rest = (position, weight_n1, bias_n1, weight1, weight_n2, bias_n2, arguments[13])
    planes = (empty_planes(x) for x in (query, key, value))
    return *planes, *(x.new_empty(x.shape) for x in rest)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, position, *rest = inputs
    weight_n1, bias_n1, running1, _, eps1, weight1, *rest = rest
    weight_n2, bias_n2, running2, _, eps2, weight2, bias2, kernel_size = rest
    out, mean1, variance1, mean2, variance2, *saved = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(
        *(query, key, value, position, weight_n1, bias_n1, mean1, variance1, weight1),
        *(weight_n2, bias_n2, mean2, variance2, weight2, bias2, out, *saved),
    )
    ctx.first, ctx.second = (eps1, running1 is None), (eps2, running2 is None)
    ctx.kernel_size = kernel_size


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    planes, norm1, weight1, norm2 = tensors[:4], tensors[4:8], tensors[8], tensors[9:13]
    weight2, bias2, *saved = tensors[13:]
    found = _pairwise_backward(
        *(grad, *planes, *norm1, *ctx.first, weight1, *norm2, *ctx.second),
        *(weight2, *saved, ctx.kernel_size),
    )
    query, key, value, position, weight_n1, bias_n1, grad1, weight_n2, bias_n2, grad2 = found
    return (
        *(query, key, value, position, weight_n1, bias_n1, None, None, None, grad1),
        *(weight_n2, bias_n2, None, None, None, grad2, torch.zeros_like(bias2), None),
    )


_pairwise.register_autograd(_differentiate, setup_context=_save)


def _flops(value_shape: tuple[int, ...], weight1: Any, weight2: Any, kernel_size: int) -> int:
    """Count the two convolutions and the aggregation, a multiply-add as 2."""
    batch, channels, height, width = value_shape
    relations = batch * height * width * kernel_size**2
    return 2 * relations * (math.prod(weight1) + math.prod(weight2) + channels)


@register_flop_formula(torch.ops.sanctl.pairwise_attention)
def _(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Count what the result takes, nothing twice."""
    weight1, weight2, kernel_size = args[6], args[12], args[14]
    return _flops(value_shape, weight1, weight2, kernel_size)


@register_flop_formula(torch.ops.sanctl.pairwise_attention_backward)
def _(grad_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Two multiply-adds for each of the forward pass, nothing twice."""
    weight1, weight2, kernel_size = args[10], args[17], args[-1]
    return 2 * _flops(grad_shape, weight1, weight2, kernel_size)
