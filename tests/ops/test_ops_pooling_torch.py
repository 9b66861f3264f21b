"""norm_pool and conv_norm_pool as torch sees them: layouts, checks, compilation, and reasons."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pooling_cases import (
    Inputs,
    PoolingCase,
    composed,
    decided,
    draw,
    each_device,
    each_layout,
    each_mode,
    each_operator,
    fused,
    output,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sanctl_ops import (
    Norm,
    conv_norm_pool,
    conv_norm_pool_obstacle,
    norm_pool,
    norm_pool_obstacle,
)
from sanctl_ops.kernels import channels
from sanctl_ops.kernels import conv_norm_pool as conv_kernels


@each_layout
@each_operator
@each_device
def test_output_and_gradient_are_channels_last(
    image_channels: int | None, layout: str, device: str
) -> None:
    case = PoolingCase("", 5, 6, image_channels=image_channels, layout=layout)
    inputs = draw(case).to(device, torch.bfloat16, torch.float32)
    out = output(inputs)
    assert out.is_contiguous(memory_format=torch.channels_last)
    first, *_ = torch.autograd.grad(out.sum(), inputs.leaves)
    if image_channels is None:
        assert first.is_contiguous(memory_format=torch.channels_last)


@each_operator
@each_mode
def test_gradcheck(image_channels: int | None, running: bool) -> None:
    inputs = draw(PoolingCase("", 5, 4, channels=3, image_channels=image_channels, running=running))
    assert decided(inputs, 1e-4).all(), "a kink is too near"

    def run(first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm = inputs.norm._replace(weight=weight, bias=bias)
        if inputs.weight is None:
            return norm_pool(first, norm)[0]
        return conv_norm_pool(inputs.x, first, norm)[0]

    assert torch.autograd.gradcheck(run, inputs.leaves)


@each_layout
@each_mode
@each_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_device
def test_opcheck(
    dtype: torch.dtype, image_channels: int | None, running: bool, layout: str, device: str
) -> None:
    parameters = torch.promote_types(dtype, torch.float32)
    case = PoolingCase("", 5, 6, image_channels=image_channels, running=running, layout=layout)
    inputs = draw(case).to(device, dtype, parameters)
    given = (inputs.x,) if inputs.weight is None else (inputs.x, inputs.weight)
    name = "norm_pool" if inputs.weight is None else "conv_norm_pool"
    forward = getattr(torch.ops.sanctl, name)
    torch.library.opcheck(forward, (*given, *inputs.norm))
    out, mean, variance, *saved = forward(*given, *inputs.norm)
    known = [t.detach() for t in (*given, *inputs.norm[:2], mean, variance)]
    flags = () if inputs.weight is not None else (not running,)
    torch.library.opcheck(
        getattr(torch.ops.sanctl, f"{name}_backward"),
        (out.detach(), *known, inputs.norm.eps, *saved, *flags),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
@each_operator
@each_device
def test_compiles_without_a_graph_break(
    image_channels: int | None, backend: str, dynamic: bool, device: str
) -> None:
    inputs = draw(PoolingCase("", 6, 7, image_channels=image_channels)).to(
        device, torch.float64, torch.float64
    )

    def layer(x: Tensor) -> Tensor:
        out, mean, variance = fused(replace(inputs, x=2 * x))
        return out.sin() + (mean + variance)[:, None, None]

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    out, wanted = compiled(inputs.x), layer(inputs.x)
    torch.testing.assert_close(out, wanted)
    assert out.stride() == wanted.stride()
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs.leaves, grad),
        torch.autograd.grad(wanted, inputs.leaves, grad),
    )


@pytest.mark.usefixtures("fresh_compiler")
@each_operator
@each_device
def test_only_the_first_other_batch_compiles_anew(image_channels: int | None, device: str) -> None:
    compiled = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    def layer(inputs: Inputs) -> Tensor:
        obstacle = (
            norm_pool_obstacle(inputs.x)
            if inputs.weight is None
            else conv_norm_pool_obstacle(inputs.x, inputs.weight.shape[0])
        )
        return output(inputs) * (1 if obstacle is None else 2)

    run = torch.compile(layer, fullgraph=True, backend=count)
    for batch in (2, 3, 5, 7):
        case = PoolingCase("", 6, 6, image_channels=image_channels, batch=batch)
        run(draw(case).to(device, torch.bfloat16, torch.float32))
    assert len(compiled) == 2


def test_flops() -> None:
    inputs = draw(PoolingCase("", 5, 6, channels=16, image_channels=3))
    with FlopCounterMode(display=False) as counter:
        output(inputs).sum().backward()
    with FlopCounterMode(display=False) as expected:
        composed(inputs).sum().backward()
    assert counter.get_total_flops() == expected.get_total_flops()


NORM = Norm(torch.ones(8), torch.zeros(8), None, None, 1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(3, 4)}, r"images must be \(N, C, H, W\), got 2-d \(3, 4\)"),
        ({"images": torch.zeros(0, 3, 4, 4)}, r"images \(0, 3, 4, 4\) has no 2 x 2 values"),
        ({"images": torch.zeros(2, 3, 1, 4)}, r"images \(2, 3, 1, 4\) has no 2 x 2 values"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "int64"),
        ({"images": torch.zeros(2, 3, 4, 4, requires_grad=True)}, "require a gradient"),
        ({"weight": torch.zeros(8, 4)}, r"weight must be \(Cout, Cin\) .* got \(8, 4\)"),
        ({"weight": torch.zeros(8, 3, 1, 1)}, r"weight must be \(Cout, Cin\)"),
        ({"weight": torch.zeros(8, 3, device="meta")}, "different devices: cpu and meta"),
        ({"norm": NORM._replace(bias=torch.zeros(7))}, r"norm.bias must be \(8,\), got \(7,\)"),
        ({"norm": NORM._replace(mean=torch.zeros(8))}, "not both"),
    ],
    ids=str,
)
def test_unusable_arguments(changed: dict[str, Any], message: str) -> None:
    usable: dict[str, Any] = {
        "images": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(8, 3),
        "norm": NORM,
    }
    with pytest.raises(ValueError, match=message):
        conv_norm_pool(**(usable | changed))
    if "images" in changed and not changed["images"].requires_grad:
        with pytest.raises(ValueError, match=message.replace("images", "x")):
            norm_pool(changed["images"], NORM)


def test_a_reason_tells_why_no_kernels_run() -> None:
    x = torch.zeros(2, 8, 4, 4)
    assert "CUDA device, not cpu" in str(norm_pool_obstacle(x))
    assert "CUDA device, not cpu" in str(conv_norm_pool_obstacle(x, 64))
    assert "gradients of images" in str(conv_norm_pool_obstacle(x.requires_grad_(), 64))
    assert channels.obstacle(torch.float32, 64, "norm_pool") is None
    assert "not float64" in str(channels.obstacle(torch.float64, 64, "norm_pool"))
    assert "multiples of 8 channels, not 12" in str(conv_kernels.obstacle(torch.float16, 3, 12))
    assert conv_kernels.obstacle(torch.bfloat16, 4, 256) is None
    assert "not 264 of 3" in str(conv_kernels.obstacle(torch.bfloat16, 3, 264))
    assert "not 64 of 5" in str(conv_kernels.obstacle(torch.bfloat16, 5, 64))
