import contextlib
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_session import python

from sanctl.config.schema import DataConfig
from sanctl.data.decode import decode_image
from sanctl.data.index import index_folder
from sanctl.data.loader import Batch, eval_loader, train_loader
from sanctl.data.pack import pack_index
from sanctl.data.packed import open_packed
from sanctl.data.sampler import EpochSampler, epoch_order, sample_seed
from sanctl.data.source import FileSource
from sanctl.data.transforms import eval_transform
from sanctl.data.workers import worker_count
from sanctl.errors import SanctlError, UserError

IMAGES = 25


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """25 different images of different sizes in three classes."""
    rng = np.random.default_rng(3)
    for i in range(IMAGES):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + i, 50 - i, 3)
        cv2.imwrite(str(path), rng.integers(0, 256, shape, np.uint8))
    return tmp_path / "images"


@pytest.fixture
def source(folder: Path) -> FileSource:
    return FileSource(index_folder(folder)[0])


def config(grayscale: bool = False) -> DataConfig:
    return DataConfig.model_validate(
        {"data_root": ".", "classes": 3, "image_size": 16, "resize": 18, "grayscale": grayscale}
    )


def together(batches: Iterable[Batch]) -> Batch:
    images, targets, indices, skipped = zip(*batches, strict=True)
    assert not any(skipped)
    return Batch(torch.cat(images), torch.cat(targets), torch.cat(indices))


def assert_equal(one: Iterable[Batch], other: Iterable[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.indices, b.indices)
        assert a.skipped == b.skipped


@pytest.mark.parametrize("grayscale", [False, True])
def test_batches_are_what_they_say(source: FileSource, grayscale: bool) -> None:
    loader = train_loader(source, config(grayscale), batch_size=8, workers=0, seed=1)
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 4
    assert [len(batch.targets) for batch in batches] == [8, 8, 8, 1]
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (1 if grayscale else 3, 16, 16)
        assert batch.images.is_contiguous()
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert batch.targets.tolist() == source.targets[batch.indices.numpy()].tolist()
    assert sorted(together(batches).indices.tolist()) == list(range(IMAGES))


def test_batches_do_not_depend_on_the_number_of_workers(source: FileSource) -> None:
    def two_epochs(workers: int) -> list[Batch]:
        loader = train_loader(source, config(), batch_size=4, workers=workers, seed=5)
        return [*loader.epoch(0), *loader.epoch(1)]

    alone = two_epochs(0)
    for workers in (1, 4):
        assert_equal(alone, two_epochs(workers))
    assert not torch.equal(alone[0].indices, alone[7].indices)


def test_draws_do_not_depend_on_the_batches(source: FileSource) -> None:
    by_index = []
    for batch_size in (1, 7, 25):
        loader = train_loader(source, config(), batch_size=batch_size, workers=0, seed=5)
        all_images = together(loader.epoch(3))
        by_index.append(all_images.images[all_images.indices.argsort()])
    assert torch.equal(by_index[0], by_index[1])
    assert torch.equal(by_index[0], by_index[2])


def test_every_epoch_and_seed_draws_anew(source: FileSource) -> None:
    seen = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        loader = train_loader(source, config(), batch_size=25, workers=0, seed=seed)
        batch = next(loader.epoch(epoch))
        image = batch.images[batch.indices == 7]
        seen.add((tuple(batch.indices.tolist()), image.numpy().tobytes()))
    assert len({order for order, _ in seen}) == 4
    assert len({image for _, image in seen}) == 4


def test_the_same_image_twice_draws_differently(folder: Path) -> None:
    """Samples of one content show that draws differ within an epoch as well."""
    index, _ = index_folder(folder)
    repeated = index.subset([24] * 6)
    batch = next(
        train_loader(FileSource(repeated), config(), batch_size=6, workers=0, seed=0).epoch(0)
    )
    assert len({image.numpy().tobytes() for image in batch.images}) == 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start_step", [0, 1, 5, 6, 7])
def test_an_epoch_goes_on_in_its_middle_without_reading_what_it_skips(
    source: FileSource, workers: int, start_step: int
) -> None:
    whole = list(train_loader(source, config(), batch_size=4, workers=0, seed=2).epoch(6))
    for batch in whole[:start_step]:
        for index in batch.indices.tolist():
            source.path(index).unlink()
    loader = train_loader(source, config(), batch_size=4, workers=workers, seed=2)
    assert_equal(loader.epoch(6, start_step), whole[start_step:])
    assert len(loader) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_does_not_show_in_the_next(source: FileSource, workers: int) -> None:
    loader = train_loader(source, config(), batch_size=2, workers=workers, seed=2)
    for _, _batch in zip(range(3), loader.epoch(0), strict=False):
        pass
    assert_equal(
        loader.epoch(1), train_loader(source, config(), batch_size=2, workers=0, seed=2).epoch(1)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_state_of_the_process_stays(source: FileSource, workers: int) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    loader = train_loader(source, config(), batch_size=4, workers=workers, seed=0)
    for epoch in range(2):
        list(loader.epoch(epoch))
    list(eval_loader(source, config(), batch_size=4, workers=workers))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_gives_every_image_once_in_order(source: FileSource, workers: int) -> None:
    loader = eval_loader(source, config(), batch_size=4, workers=workers)
    assert len(loader) == 7
    transform = eval_transform(18, 16)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.targets) for batch in batches] == [4, 4, 4, 4, 4, 4, 1]
        seen = together(batches)
        assert seen.indices.tolist() == list(range(IMAGES))
        assert seen.targets.tolist() == source.targets.tolist()
    for i in (0, 13, 24):
        pixels = torch.from_numpy(decode_image(source.read(i), 3, ""))
        assert torch.equal(seen.images[i], transform(pixels.permute(2, 0, 1)))


def test_a_pack_gives_what_its_files_give(folder: Path, tmp_path: Path) -> None:
    index, _ = index_folder(folder)
    pack_index(index, folder, tmp_path / "train_imgs.pt", workers=0)
    pack = open_packed(tmp_path / "train_imgs.pt")
    files = train_loader(FileSource(index), config(), batch_size=4, workers=0, seed=3)
    assert_equal(
        train_loader(pack, config(), batch_size=4, workers=2, seed=3).epoch(0), files.epoch(0)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "zero bytes", "not an image", "No such file"])
def test_a_damaged_image_is_named_in_one_line(
    source: FileSource, workers: int, damage: str
) -> None:
    bad = source.path(17)
    whole = bad.read_bytes()
    if damage == "No such file":
        bad.unlink()
    else:
        bad.write_bytes(
            {"truncated": whole[:-50], "zero bytes": b"", "not an image": b"text" * 9}[damage]
        )
    for batches in (
        train_loader(source, config(), batch_size=4, workers=workers, seed=2).epoch(0),
        iter(eval_loader(source, config(), batch_size=4, workers=workers)),
    ):
        with pytest.raises(UserError, match=re.escape(str(bad))) as caught:
            list(batches)
        assert damage in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 2


def test_after_an_error_the_workers_go_at_once(source: FileSource) -> None:
    """Also without a garbage collection, in which they would be waited for."""
    source.path(17).write_bytes(b"")
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(UserError):
            list(train_loader(source, config(), batch_size=4, workers=2, seed=2).epoch(0))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


class DeadlySource(FileSource):
    """Its worker is killed when it reads the image, as by a kernel out of memory."""

    def read(self, index: int) -> bytes:
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_worker_that_is_killed(folder: Path) -> None:
    loader = eval_loader(DeadlySource(index_folder(folder)[0]), config(), batch_size=4, workers=2)
    with pytest.raises(SanctlError, match="a data worker died") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 1


INTERRUPTED = """
import sys
from pathlib import Path
from sanctl.config.schema import DataConfig
from sanctl.data.index import index_folder
from sanctl.data.loader import train_loader
from sanctl.data.source import FileSource

data = DataConfig.model_validate({"data_root": ".", "classes": 3, "image_size": 16})
source = FileSource(index_folder(Path(sys.argv[1]))[0])
loader = train_loader(source, data, batch_size=4, workers=2, seed=0)
try:
    for epoch in range(100_000):
        for batch in loader.epoch(epoch):
            if epoch == 1:
                print("ready", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_ctrl_c_reaches_the_main_process_alone(folder: Path) -> None:
    with python("-c", INTERRUPTED, str(folder)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert output.endswith("stopped\n")
        assert errors == ""
        assert process.returncode == 0
        deadline = time.monotonic() + 20
        while group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not group_lives(process.pid)


def test_ctrl_c_while_workers_start_is_not_lost(folder: Path) -> None:
    """Python swallows what is raised in the hooks of a fork."""
    at_fork = "import os, signal\nos.register_at_fork(before=lambda: signal.raise_signal(2))\n"
    process = subprocess.run(
        [sys.executable, "-c", at_fork + INTERRUPTED, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.stdout, process.stderr) == ("stopped\n", "")


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_more_workers_than_cores_are_no_reason_for_a_warning(
    source: FileSource, recwarn: pytest.WarningsRecorder
) -> None:
    workers = (os.cpu_count() or 1) + 1
    list(train_loader(source, config(), batch_size=4, workers=workers, seed=0).epoch(0))
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


@given(seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6), length=st.integers(0, 300))
def test_the_order_of_an_epoch(seed: int, epoch: int, length: int) -> None:
    order = epoch_order(seed, epoch, length)
    assert sorted(order.tolist()) == list(range(length))
    assert order.tolist() == epoch_order(seed, epoch, length).tolist()


def test_seeds_of_samples_differ() -> None:
    seeds = {sample_seed(s, e, i) for s in range(8) for e in range(8) for i in range(64)}
    assert len(seeds) == 8 * 8 * 64
    assert max(seeds) < 2**64


@given(length=st.integers(1, 60), batch_size=st.integers(1, 20), start_step=st.integers(0, 70))
def test_steps_of_an_epoch(length: int, batch_size: int, start_step: int) -> None:
    sampler = EpochSampler(length, batch_size, seed=4)
    sampler.set(2, 0)
    steps = list(sampler)
    assert len(steps) == len(sampler)
    assert all(len(keys) == batch_size for keys in steps[:-1])
    assert [key for keys in steps for key in keys] == [
        (2, index) for index in epoch_order(4, 2, length).tolist()
    ]
    sampler.set(2, start_step)
    assert list(sampler) == steps[start_step:]


def test_how_many_processes_suit() -> None:
    assert worker_count(None, 10) == 0
    assert worker_count(3, 10) == 3
    assert worker_count(0, 10**6) == 0
    assert worker_count(None, 10**6) == min(len(os.sched_getaffinity(0)), 16)
