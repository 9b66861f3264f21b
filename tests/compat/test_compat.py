"""Files of every released version, and of the scripts before, load and mean the same for ever."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sanctl.config.load import load_config, parse_config
from sanctl.data.decode import decode_image
from sanctl.data.index import load_index
from sanctl.data.normalize import Normalizer
from sanctl.data.packed import PackedImages, open_packed
from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.device import Precision
from sanctl.engine.run import build_network
from sanctl.engine.state import TrainState, load_weights

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("v*"))
ORIGINAL = HERE / "original"
CLASSES = ["ant", "bee"]
SAMPLES = [("ant/0.png", 0), ("bee/1.png", 1), ("bee/2.png", 1)]


def pixels(number: int) -> np.ndarray:
    return (np.arange(30, dtype=np.uint8) * 8 + number).reshape(6, 5, 1)


def require_images(pack: PackedImages) -> None:
    assert pack.classes == CLASSES
    assert pack.targets.tolist() == [0, 1, 1]
    for number in range(3):
        assert np.array_equal(decode_image(pack.read(number), 1, "x"), pixels(number))


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
class TestVersions:
    def test_index(self, folder: Path) -> None:
        index = load_index(folder / "data_init.pt")
        assert (index.classes, index.samples) == (CLASSES, SAMPLES)
        for position in range(3):
            data = index.path(position).read_bytes()
            assert np.array_equal(decode_image(data, 1, "x"), pixels(position))

    def test_pack(self, folder: Path) -> None:
        pack = open_packed(folder / "train_imgs.pt")
        require_images(pack)
        assert [pack.name(number) for number in range(3)] == [name for name, _ in SAMPLES]

    def test_configurations(self, folder: Path) -> None:
        resolved = load_config(folder / "resolved.yaml").config
        assert resolved.DATA.data_root == "pictures"
        assert resolved.DATA.in_chans == 1
        assert (resolved.DATA.mean, resolved.DATA.std) == ([0.1307], [0.3081])
        assert (resolved.DATA.image_size, resolved.DATA.resize) == (32, 37)
        train = resolved.TRAIN
        assert (train.arch, train.sa_type, train.layers) == ("san", 1, [1, 1])
        assert (train.widths, train.kernels, train.ema_decay) == ([32, 32], [3, 3], 0.9)
        assert (train.base_lr, train.epochs, train.scheduler) == (0.1, 100, "cosine")
        assert resolved.TEST.batch_size_test == 100
        new = load_config(folder / "new.yaml").config
        assert (new.DATA.classes, new.DATA.image_size) == (250, 224)
        assert (new.TRAIN.layers, new.TRAIN.kernels) == ([2, 1, 2, 4, 1], [3, 7, 7, 7, 7])

    def test_checkpoint(self, folder: Path) -> None:
        path = folder / "checkpoint.pth"
        saved = load_checkpoint(path)
        assert (saved.epoch, saved.step, saved.classes) == (4, 2, CLASSES)
        assert (saved.best_epoch, saved.best_score) == (2, 62.5)
        assert saved.scores == {"epoch": 3, "top1_val": 50.0}
        assert (saved.dataset, saved.name) == ("pictures", "tiny")
        assert saved.config is not None
        config = parse_config(saved.config, "x")
        images = Normalizer(config.DATA.mean, config.DATA.std)(torch.full((2, 1, 32, 32), 90))
        logits = torch.load(folder / "logits.pt", weights_only=True)
        network = build_network(config)
        load_weights(network, saved.state_dict, path)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(images), logits)

    def test_a_run_goes_on_from_the_checkpoint(self, folder: Path) -> None:
        path = folder / "checkpoint.pth"
        saved = load_checkpoint(path)
        assert saved.config is not None
        assert saved.optimizer is not None
        config = parse_config(saved.config, "x")
        state = TrainState(build_network(config), config.TRAIN, Precision("cpu"))
        state.restore(saved, path)
        assert (state.epoch, state.step, state.best_epoch, state.best_score) == (3, 2, 2, 62.5)
        ours = state.optimizer.state_dict()["state"]
        assert ours.keys() == saved.optimizer["state"].keys()
        for key, entry in saved.optimizer["state"].items():
            assert torch.equal(ours[key]["momentum_buffer"], entry["momentum_buffer"])
        assert state.ema is not None
        averaged = state.ema.module.state_dict()
        for name, value in saved.weights().items():
            assert torch.equal(averaged[name], value)


def test_there_are_files_of_the_first_version() -> None:
    assert HERE / "v0.1.0" in VERSIONS


def test_original_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _ in SAMPLES:
        image = tmp_path / "dataset" / "Sketch_EITZ" / "png_w256" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
    copy = tmp_path / "dataset" / "Sketch_EITZ" / "train_init.pt"
    copy.write_bytes((ORIGINAL / "train_init.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    index = load_index(Path("dataset/Sketch_EITZ/train_init.pt"))
    assert index.classes == CLASSES
    assert index.samples == [(f"dataset/Sketch_EITZ/png_w256/{name}", k) for name, k in SAMPLES]
    assert all(index.path(position).is_file() for position in range(3))


@pytest.mark.parametrize("name", ["train_imgs.pt", "val_imgs.pt"])
def test_original_packs(name: str) -> None:
    require_images(open_packed(ORIGINAL / name))


@pytest.mark.parametrize("name", ["san10_pairwise.pth", "older.pth"])
def test_original_checkpoints(name: str) -> None:
    saved = load_checkpoint(ORIGINAL / name)
    assert saved.epoch == 100
    assert list(saved.state_dict) == ["module.conv_in.weight", "module.fc.bias"]
    for value in saved.state_dict.values():
        assert value.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_original_configuration() -> None:
    config = load_config(ORIGINAL / "config.yaml").config
    assert (config.DATA.dataset_init, config.DATA.classes) == ("txt_mappings", 250)
    assert config.DATA.data_root == "dataset/Sketch_EITZ"
    train = config.TRAIN
    assert (train.arch, train.sa_type) == ("hybrid", 1)
    assert train.layer_types == ["res", "res", "san", "san"]
    assert (train.layers, train.added_nl_blocks) == ([1, 1, 2, 1], [0, 1, 2, 0])
    assert train.widths == [256, 512, 1024, 2048]
    assert (train.ignore_label, train.label_smoothing, train.mixup_alpha) == (2000, 0.1, 0.0)
    assert (train.epochs, train.batch_size, train.weight_decay) == (50, 64, 0.0001)
    assert str(config.run_dir) == "exp/sketch_eitz/hybrid_patch_2-2_nl"
