"""Whatever the shapes: the operators agree with the loops, or refuse what has no meaning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import LAYOUTS, OPERATORS, Case, as_array, make_inputs

SIDES = st.integers(1, 9)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shared = draw(st.integers(1, 3))
    return Case(
        name="drawn",
        height=draw(SIDES),
        width=draw(SIDES),
        kernel_size=draw(st.integers(1, 5)),
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 5)),
        dilation=draw(st.integers(1, 3)),
        pad_mode=draw(st.sampled_from(["reflect", "zero"])),
        batch=draw(st.integers(0, 2)),
        channels=shared * draw(st.integers(1, 3)),
        shared=shared,
        layout=draw(st.sampled_from(LAYOUTS)),
    )


def has_meaning(case: Case) -> bool:
    """Every window lies in the padded plane, and the padding mirrors pixels that exist."""
    side = min(case.height, case.width)
    last_tap = (case.kernel_size - 1) * case.dilation
    mirrored = case.pad_mode == "zero" or case.padding < side
    return mirrored and last_tap < side + 2 * case.padding


@settings(max_examples=100)
@given(case=cases(), name=st.sampled_from(sorted(OPERATORS)))
def test_any_shape(case: Case, name: str) -> None:
    operator = OPERATORS[name]
    inputs = make_inputs(operator, case, "cpu")
    if not has_meaning(case):
        with pytest.raises(ValueError, match=str(case.height)):
            operator.run(*inputs, case.geometry)
        return
    arrays = [as_array(x) for x in inputs]
    out = operator.run(*inputs, case.geometry)
    np.testing.assert_allclose(
        as_array(out), operator.expected(*arrays, case.geometry), rtol=1e-12, atol=1e-13
    )
    out.sum().backward()
    expected = operator.gradients(*arrays, np.ones(out.shape), case.geometry)
    for x, wanted in zip(inputs, expected, strict=True):
        assert x.grad is not None
        np.testing.assert_allclose(as_array(x.grad), wanted, rtol=1e-12, atol=1e-13)
