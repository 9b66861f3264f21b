"""Measures what a replica costs that exchanges gradients with nobody: figures of ops/NOTES.md.

    python tests/bench/time_replica.py resnet50 san10_patchwise san10_pairwise

Networks train on a GPU as `sanctl bench-models --amp --channels-last --compile --batch 256` trains
them, each alone and as a replica, in turns, measured by what `--gpus` measures several processes
with. Several reach at most their number times the share that is printed. Without a GPU, batches and
images are small.
"""

import sys
from datetime import timedelta

import torch

from sanctl.bench.network import ModelSettings
from sanctl.bench.scaling import bench_scaling
from sanctl.config.schema import TrainConfig
from sanctl.engine.device import prepare_backends
from sanctl.engine.store import connect
from sanctl.engine.team import ProcessTeam, Team

ROUNDS = 9
TIMEOUT = timedelta(minutes=10)


def main(names: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    batch, size = (256, 224) if on_gpu else (2, 128)
    settings = ModelSettings(
        "train", batch, size, torch.bfloat16, compiled=True, channels_last=True
    )
    backend = "nccl" if on_gpu else "gloo"
    team = ProcessTeam(Team(), connect("127.0.0.1", 0, True, TIMEOUT), backend, TIMEOUT)
    prepare_backends(TrainConfig(manual_seed=0), device)
    for record in bench_scaling(names, names[0], settings, ROUNDS, device, team):
        if record.scaling is None:
            sys.stdout.write(f"{record.network}: {record.failure}\n")
            continue
        least, most = min(record.scalings), max(record.scalings)
        sys.stdout.write(
            f"{record.network}: {record.alone_images_per_s:,.4g} images/s alone, a replica "
            f"{record.scaling:.3f} of that ({least:.3f} to {most:.3f})\n"
        )
    team.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
