"""Which samples make up a batch, and which part of it each of several processes has."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sanctl.data.sampler import EpochSampler, Key, Share


def steps(length: int, batch: int, seed: int | None, share: Share, start: int) -> list[list[Key]]:
    sampler = EpochSampler(length, batch, seed, share)
    sampler.set(4, start)
    return list(sampler)


@settings(max_examples=50)
@given(
    length=st.integers(0, 60),
    batch=st.integers(1, 20),
    size=st.integers(1, 9),
    seed=st.none() | st.integers(0, 5),
    start=st.integers(0, 3),
)
def test_the_shares_of_a_batch_are_the_batch_on_any_number_of_processes(
    length: int, batch: int, size: int, seed: int | None, start: int
) -> None:
    whole = steps(length, batch, seed, Share(0, 1), start)
    shares = [steps(length, batch, seed, Share(rank, size), start) for rank in range(size)]
    assert {len(share) for share in shares} == {len(whole)}  # nobody waits for a step of another
    for number, parts in enumerate(zip(*shares, strict=True)):
        assert [key for part in parts for key in part] == whole[number]
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert lengths[0] == max(lengths)  # so that rank 0 always has something
        assert EpochSampler(length, batch, seed).batch_length(start + number) == sum(lengths)


@settings(max_examples=50)
@given(length=st.integers(1, 60), batch=st.integers(1, 20), size=st.integers(1, 9))
def test_an_epoch_has_every_sample_once(length: int, batch: int, size: int) -> None:
    keys = [
        key
        for rank in range(size)
        for step in steps(length, batch, 3, Share(rank, size), 0)
        for key in step
    ]
    assert sorted(keys) == [(4, index) for index in range(length)]


def test_a_share_keeps_the_order() -> None:
    assert Share(1, 3).of(np.array([7, 1, 9, 4])).tolist() == [9]
    assert Share(0, 3).of(np.array([7, 1, 9, 4])).tolist() == [7, 1]
