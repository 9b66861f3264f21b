"""Patchwise self-attention in one operator: from query, key and value to the attended values."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sanctl_ops import patchwise_formulas as formulas
from sanctl_ops.attention import Attention, Norm, dense
from sanctl_ops.attention_checks import check_images, check_patchwise_layers
from sanctl_ops.backend import choose_backend, runs_kernels
from sanctl_ops.kernels import patchwise as kernels
from sanctl_ops.kernels import patchwise_backward as backward_kernels
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.patchwise import Parameters
from sanctl_ops.kernels.patchwise_plan import Sizes, sizes_of
from sanctl_ops.patchwise_formulas import Layer
from sanctl_ops.window import accumulation_dtype, plane_format


def patchwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    bias2: Tensor,
    kernel_size: int,
) -> Attention:
    """Weigh the K x K values around every pixel by weights made from its query and the keys there.

    The relation of a pixel is its query followed by the K x K keys around it. It goes through batch
    normalisation, ReLU, `weight1`, batch normalisation, ReLU, and `weight2` with `bias2`, and what
    comes out weighs the values: patchwise attention with the concatenation relation (Zhao et al.,
    CVPR 2020, section 3.2). Neither direction holds relations or weights of more than a few images.
    Windows have stride 1, borders are mirrored, and two runs give the same bits.

    The kernels multiply halves, which have as many digits as TF32, and add up in float32, weighed
    values of one row of taps in halves. They take float32 only where products may be rounded to
    TF32 (`torch.set_float32_matmul_precision`).

    Args:
        query: (N, rel, H, W), float16, bfloat16, float32 or float64, in any memory layout.
        key: like query.
        value: (N, C, H, W), of query's dtype.
        norm1: the normalisation of rel * (K*K + 1) channels: the query's, then channel c of the key
            at tap j as number rel + c * K*K + j. Taps are numbered row by row.
        weight1: (Cw, rel * (K*K + 1)), where Cw divides C: value channel c is weighed by weight
            channel c % Cw.
        norm2: the normalisation of Cw channels.
        weight2: (Cw * K*K, Cw); row w * K*K + j makes the weight of tap j for weight channel w.
        bias2: (Cw * K*K,).
        kernel_size: taps per side of the window, K, odd. H and W exceed K // 2.

    Returns:
        The output, which gradients flow from to the three images (channels_last if they are, else
        contiguous), to weight1, weight2, bias2, and to weight and bias of the normalisations; and
        the statistics, which have none.

    Raises:
        ValueError: an image is not 4-d or of another type, dtypes or devices differ, shapes do not
            fit, there are no pixels, or kernel_size is even or below 1.
    """
    check_images(query, key, value, kernel_size)
    taps = kernel_size**2
    relation = query.shape[1] * (taps + 1)
    check_patchwise_layers(relation, norm1, weight1, norm2, weight2, bias2, value, taps)
    out, *statistics, _ = _patchwise_attention(
        *(query, key, value),
        *norm1,
        weight1,
        *norm2,
        weight2,
        bias2,
        kernel_size,
    )
    return Attention(out, *statistics)


def patchwise_attention_obstacle(
    query: Tensor, value: Tensor, hidden: int, kernel_size: int
) -> str | None:
    """Return why no kernels of its own run `patchwise_attention`, or None where they do.

    Without them the operator is made of the other operators and of torch's, a few images at a time.
    Of float32 the answer changes with `torch.set_float32_matmul_precision`.

    Args:
        query: (N, rel, H, W).
        value: (N, C, H, W).
        hidden: rows of weight1, Cw.
        kernel_size: K.

    Raises:
        BackendError: the CuPy kernels are asked for by name and cannot run on query's device.
    """
    share = value.shape[1] // hidden
    return _obstacle(query.device, query.dtype, *query.shape[1:], hidden, share, kernel_size)


# torch.compile asks once for sizes, and need not look into it; it may see any number of images.
@torch.compiler.assume_constant_result
def _obstacle(
    device: torch.device,
    dtype: torch.dtype,
    relation: int,
    height: int,
    width: int,
    hidden: int,
    share: int,
    kernel_size: int,
) -> str | None:
    choice = choose_backend(device)
    if choice.name == "torch":
        return choice.reason
    return plan.obstacle(dtype, Sizes(1, height, width, relation, hidden, share, kernel_size))


def _sizes(query: Tensor, value: Tensor, hidden: int, kernel_size: int) -> Sizes:
    batch, relation, height, width = query.shape
    share = value.shape[1] // hidden
    return sizes_of(batch, height, width, relation, hidden, share, kernel_size)


def _sizes_for_kernels(query: Tensor, value: Tensor, hidden: int, kernel_size: int) -> Sizes | None:
    """Return the sizes if the kernels are to run, or None."""
    sizes = _sizes(query, value, hidden, kernel_size)
    if not runs_kernels(query.device) or plan.obstacle(query.dtype, sizes) is not None:
        return None
    return sizes


def _parameters(layer: Layer) -> Parameters:
    """Return the layer as the kernels take it."""
    norm1, norm2 = layer.norm1.to(torch.float32), layer.norm2.to(torch.float32)
    weights = (layer.weight1, layer.weight2, layer.bias2)
    weight1, weight2, bias2 = (dense(t, torch.float32) for t in weights)
    return Parameters(norm1, weight1, norm2, weight2, bias2)


@torch.library.custom_op(
    "sanctl::patchwise_attention", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
def _patchwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm1_mean: Tensor | None,
    norm1_variance: Tensor | None,
    eps1: float,
    weight1: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    norm2_mean: Tensor | None,
    norm2_variance: Tensor | None,
    eps2: float,
    weight2: Tensor,
    bias2: Tensor,
    kernel_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, means and variances, and the first convolution's (N, H * W, Cw).

    These have 3 dimensions because tensors of 4 are planes to torch.compile, whose channels it may
    put last.
    """
    norm1 = Norm(norm1_weight, norm1_bias, norm1_mean, norm1_variance, eps1)
    norm2 = Norm(norm2_weight, norm2_bias, norm2_mean, norm2_variance, eps2)
    layer = Layer(norm1, weight1, norm2, weight2, bias2, kernel_size)
    sizes = _sizes_for_kernels(query, value, weight1.shape[0], kernel_size)
    if sizes is None:
        return formulas.forward(query, key, value, layer)
    out, *statistics, hidden = kernels.forward(sizes, query, key, value, _parameters(layer))
    out = out.contiguous(memory_format=plane_format(value))
    # An operator may not return what it was given.
    mean1, variance1, mean2, variance2 = (
        t.clone() if known is not None else t
        for t, known in zip(
            statistics, (norm1_mean, norm1_variance, norm2_mean, norm2_variance), strict=True
        )
    )
    return out, mean1, variance1, mean2, variance2, hidden


@_patchwise_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    out = torch.empty_like(value, memory_format=plane_format(value))
    mean1, variance1 = (query.new_empty(args[0].shape, dtype=dtype) for _ in range(2))
    mean2, variance2 = (query.new_empty(args[6].shape, dtype=dtype) for _ in range(2))
    batch, _, height, width = query.shape
    hidden = query.new_empty((batch, height * width, args[6].shape[0]), dtype=dtype)
    return out, mean1, variance1, mean2, variance2, hidden


@torch.library.custom_op(
    "sanctl::patchwise_attention_backward",
    mutates_args=(),
    tags=(torch.Tag.needs_fixed_stride_order,),
)
def _patchwise_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    eps1: float,
    weight1: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    eps2: float,
    weight2: Tensor,
    bias2: Tensor,
    kernel_size: int,
    by_batch1: bool,
    by_batch2: bool,
) -> list[Tensor]:
    norm1 = Norm(norm1_weight, norm1_bias, mean1, variance1, eps1)
    norm2 = Norm(norm2_weight, norm2_bias, mean2, variance2, eps2)
    layer = Layer(norm1, weight1, norm2, weight2, bias2, kernel_size)
    by_batch = (by_batch1, by_batch2)
    sizes = _sizes_for_kernels(query, value, weight1.shape[0], kernel_size)
    if sizes is None:
        return list(formulas.backward(grad, query, key, value, hidden, layer, by_batch))
    gradients = backward_kernels.backward(
        sizes, grad, query, key, value, hidden.contiguous(), _parameters(layer), by_batch
    )
    images = (
        g.contiguous(memory_format=plane_format(x))
        for g, x in zip(gradients[:3], (query, key, value), strict=True)
    )
    given = (norm1_weight, norm1_bias, weight1, norm2_weight, norm2_bias, weight2, bias2)
    parameters = (dense(g, p.dtype) for g, p in zip(gradients[3:], given, strict=True))
    return [*images, *parameters]


@_patchwise_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *args: Any
) -> list[Tensor]:
    images = [torch.empty_like(x, memory_format=plane_format(x)) for x in (query, key, value)]
    parameters = (*args[:2], *args[5:8], *args[11:13])
    return images + [p.new_empty(p.shape) for p in parameters]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, *norm1, weight1, w2, b2, m2, _, eps2, weight2, bias2, kernel_size = inputs
    mean1, variance1, mean2, variance2, hidden = output[1:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(query, key, value, hidden, *norm1[:2], mean1, variance1, weight1),
        *(w2, b2, mean2, variance2, weight2, bias2),
    )
    ctx.constants = (norm1[4], eps2, kernel_size, norm1[2] is None, m2 is None)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    eps1, eps2, *rest = ctx.constants
    saved = ctx.saved_tensors
    gradients = _patchwise_attention_backward(
        grad, *saved[:8], eps1, *saved[8:13], eps2, *saved[13:], *rest
    )
    images, norm1, weight1 = gradients[:3], gradients[3:5], gradients[5]
    norm2, second = gradients[6:8], gradients[8:]
    unknown = (None,) * 3
    return *images, *norm1, *unknown, weight1, *norm2, *unknown, *second, None


_patchwise_attention.register_autograd(_differentiate, setup_context=_save)


def _flops(value: tuple[int, ...], weight1: tuple[int, ...], weight2: tuple[int, ...]) -> int:
    """Multiply-adds of the two convolutions and of the aggregation, each counted as 2."""
    pixels = value[0] * math.prod(value[2:])
    taps = weight2[0] // weight2[1]
    return 2 * pixels * (math.prod(weight1) + math.prod(weight2) + value[1] * taps)


@register_flop_formula(torch.ops.sanctl.patchwise_attention)
def _(query: Any, key: Any, value: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return _flops(value, args[5], args[11])


@register_flop_formula(torch.ops.sanctl.patchwise_attention_backward)
def _(grad: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """As much again for each of the two factors of every product."""
    return 2 * _flops(grad, args[9], args[15])
