"""One training process of tests/training/test_loop.py, alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from stand_in import Centroid, Overflowing, Shapes

from perception.errors import ConfigError
from perception.synthetic.city import CityConfig
from perception.training.config import OptimiserConfig, TrainingConfig
from perception.training.data import batches
from perception.training.distributed import joined
from perception.training.loop import Training

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--overflow", action="store_true", help="in the second process")
    parser.add_argument("--own-folder", action="store_true", help="by rank, below the folder")
    arguments = parser.parse_args()
    config = TrainingConfig(
        data=CityConfig(),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        workers=0,
        log_every=1,
        tensorboard=False,
        optimiser=OptimiserConfig(lr=1e-2),
    )
    with joined("cpu") as place:
        torch.manual_seed(0)
        network = Centroid(normalised=False, dropout=0.0)
        if arguments.overflow:
            network = Centroid() if place.leads else Overflowing("statistics")
        folder = arguments.folder / str(place.rank) if arguments.own_folder else arguments.folder
        try:
            training = Training(
                network,
                config,
                place,
                folder,
                report=lambda p: print(f"step {p.step}", flush=True),  # noqa: T201
            )
        except ConfigError as error:
            sys.stdout.write(f"{error}\n")  # at once: the other process writes there too
            sys.stdout.flush()
            sys.exit()  # without failing: torchrun would end the others before they tell theirs
        training.run(batches(config, Shapes(), network.needs, place, 0))
