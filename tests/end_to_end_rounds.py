"""Rounds of end-to-end training on the tiny model, one train step at a time."""

import torch

from common.distributed import Processes
from diffusion import create_diffusion
from end_to_end.rounds import EndToEnd
from training.run import Run
from training.settings import EndToEndSettings, TrainSettings
from training.target import Target


def rounds_of(model, method: EndToEndSettings, num_steps: int = 4, speedup: float = 1.5) -> EndToEnd:
    settings = TrainSettings(method, num_sampling_steps=str(num_steps), global_batch_size=4)
    processes = Processes(0, 1, torch.device("cpu"))
    target = Target("speedup", speedup, model, num_steps)
    return EndToEnd(settings, processes, model, create_diffusion(str(num_steps)), target)


def take_step(rounds: EndToEnd, training):
    (update,) = rounds.run(training)
    training.train_steps += 1
    return update


def stop_after(steps: int):
    """In place of `Run.step_done`: the run is interrupted after so many train steps."""
    step_done, done = Run.step_done, iter(range(steps))

    def step_or_die(self, update):
        if next(done, None) is None:
            raise KeyboardInterrupt
        step_done(self, update)

    return step_or_die
