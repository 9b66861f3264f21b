"""What the launches compute for the kernels, on the CPU."""

from hypothesis import example, given
from hypothesis import strategies as st

from sanctl_ops.kernels.geometry import DIVISOR, divisor_argument

WORD = 2**32


@given(n=st.integers(0, WORD - 1), divisor=st.integers(1, 2**31))
@example(n=WORD - 1, divisor=1)
@example(n=WORD - 1, divisor=2)
@example(n=WORD - 1, divisor=7)
@example(n=WORD - 1, divisor=2**31)
@example(n=2**31 - 2, divisor=2**31 - 1)
def test_a_divisor_divides_as_the_kernels_do(n: int, divisor: int) -> None:
    struct = divisor_argument(divisor).view(DIVISOR)
    high = n * int(struct["multiplier"]) // WORD
    rounded = (high + (n - high) // 2) >> int(struct["shift"])
    assert (n if struct["divisor"] == 1 else rounded) == n // divisor
