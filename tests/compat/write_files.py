"""Wrote the files in a folder beside it, by the version whose name the folder bears.

They are never written again: `test_compat.py` holds that each loads, and means the same, for ever.
For a new version, run it once with that version installed:

    python tests/compat/write_files.py tests/compat/v0.2.0
"""

import io
import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from sanctl.config.load import config_to_yaml, parse_config
from sanctl.config.presets import compose
from sanctl.data.index import ImageIndex, save_index
from sanctl.data.normalize import Normalizer
from sanctl.data.pack import pack_index
from sanctl.engine.checkpoint import Checkpoint
from sanctl.engine.device import Precision
from sanctl.engine.run import build_network
from sanctl.engine.state import TrainState

CLASSES = ["ant", "bee"]
CONFIG = {
    "DATA": {"data_root": "pictures", "classes": 2, "grayscale": True, "image_size": 32},
    "TRAIN": {
        "arch": "san",
        "sa_type": 1,
        "layers": [1, 1],
        "widths": [32, 32],
        "kernels": [3, 3],
        "ema_decay": 0.9,
        "manual_seed": 5,
    },
}


def pixels(number: int) -> np.ndarray:
    """A gray image of 6 x 5 px that no library has a say in."""
    return (np.arange(30, dtype=np.uint8) * 8 + number).reshape(6, 5)


def png(number: int) -> bytes:
    return cv2.imencode(".png", pixels(number))[1].tobytes()


def write_ours(folder: Path) -> None:
    """An index, a pack, configurations, and a checkpoint in the middle of an epoch."""
    index = ImageIndex(CLASSES, [("ant/0.png", 0), ("bee/1.png", 1), ("bee/2.png", 1)])
    save_index(ImageIndex(CLASSES, index.samples, root=folder), folder / "data_init.pt")
    for number, (name, _) in enumerate(index.samples):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png(number))
    pack_index(index, folder, folder / "train_imgs.pt", workers=0)
    config = parse_config(CONFIG, "here")
    (folder / "resolved.yaml").write_text(config_to_yaml(config))
    (folder / "new.yaml").write_text(compose("sketch_eitz", "san10_patchwise"))
    torch.manual_seed(5)
    state = TrainState(build_network(config), config.TRAIN, Precision("cpu"))
    images = Normalizer(config.DATA.mean, config.DATA.std)(torch.full((2, 1, 32, 32), 90))
    state.model(images).sum().backward()
    state.optimizer.step()
    assert state.ema is not None
    state.ema.update_parameters(state.model)
    state.epoch, state.step, state.best_epoch, state.best_score = 3, 2, 2, 62.5
    checkpoint: Checkpoint = state.checkpoint()
    checkpoint.scores = {"epoch": 3, "top1_val": 50.0}
    checkpoint.config, checkpoint.classes = config.model_dump(), CLASSES
    checkpoint.dataset, checkpoint.name = "pictures", "tiny"
    checkpoint.save(folder / "checkpoint.pth")
    network = state.model.eval()
    with torch.no_grad():
        torch.save(network(images), folder / "logits.pt")


def write_original(folder: Path) -> None:
    """The formats of the scripts that came before: index, two packs, a published checkpoint."""
    samples = [(f"dataset/Sketch_EITZ/png_w256/{CLASSES[k]}/{i}.png", k) for i, k in _ORDER]
    numbers = {name: number for number, name in enumerate(CLASSES)}
    head = {"classes": CLASSES, "class_to_idx": numbers, "extensions": (".png",)}
    torch.save(head | {"samples": samples}, folder / "train_init.pt")
    images = [(io.BytesIO(png(i)), k) for i, k in _ORDER]
    torch.save(head | {"samples": images}, folder / "train_imgs.pt")
    (folder / "val_imgs.pt").write_bytes(pickle.dumps(head | {"samples": images}, protocol=2))
    weights = {f"module.{key}": torch.arange(4.0) for key in ("conv_in.weight", "fc.bias")}
    scores = {"top1_val": np.float64(74.9), "top5_val": np.float32(92.0)}
    published = {"epoch": 100, "state_dict": weights, "optimizer": {"state": {}}} | scores
    torch.save(published, folder / "san10_pairwise.pth")
    older = folder / "older.pth"
    torch.save(published, older, _use_new_zipfile_serialization=False)
    # As numpy 1 named the module.
    older.write_bytes(older.read_bytes().replace(b"numpy._core", b"numpy.core"))


_ORDER = [(0, 0), (1, 1), (2, 1)]

if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    (write_original if target.name == "original" else write_ours)(target)
