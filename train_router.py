"""Train a caching router for a frozen DiT: HarmoniCa, Learning-to-Cache, or end to end.

The published HarmoniCa run (no images are needed):

    torchrun --nnodes=1 --nproc_per_node=4 --master_port 12345 train_router.py --results-dir results \\
        --model DiT-XL/2 --image-size 256 --num-classes 1000 --epochs 2000 --global-batch-size 64 \\
        --global-seed 42 --vae ema --num-works 8 --log-every 100 --ckpt-every 1000 --wandb \\
        --num-sampling-steps 10 --l1 7e-8 --lr 0.01 --max-steps 20000 --cfg-scale 1.5 --ste-threshold 0.1 \\
        --lambda-c 500

Plain `python train_router.py ...` is the same on one process. Everything lands in RESULTS_DIR/NNN-MODEL-...:
checkpoints (each is a router that sample.py reads), log.txt, metrics.jsonl, schedule.png. To go on after an
interruption, run the same command with `--resume auto`: the logits come out the same, bit for bit.
`--global-batch-size` counts rows of a forward pass: under guidance 64 rows are 32 trajectories.

You may ask for a speed instead of a regularization weight: `--target-cur 0.4` or `--target-speedup 1.6`.
Learning-to-Cache needs images: `--method l2c --data FOLDER` (one folder per class, encoded by the VAE).
`--method end-to-end --target-speedup 2` trains a schedule and its reuse on the error of the final image;
`--any-speed` in place of the target trains one router for every speed-up.
"""

from common import lifeline  # isort: skip  # noqa: F401  # first: under torchrun this process ends with it

import argparse

from tqdm import tqdm

import end_to_end.any_speed
import training.rounds
from common import cli, distributed
from training.arguments import parse_args
from training.run import train
from training.settings import TrainSettings

ROUNDS = training.rounds.ROUNDS | end_to_end.any_speed.ROUNDS


def main(args: argparse.Namespace) -> None:
    processes = distributed.start(args.device)
    if processes.is_main:
        cli.show_notes(args)
    train(TrainSettings.from_arguments(args), ROUNDS, processes, show=tqdm.write)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, parse_args())
