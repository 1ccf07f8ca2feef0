"""Sample many images into one ADM-style .npz (`arr_0`, uint8 NHWC), on any number of processes and nodes.

    torchrun --nproc_per_node=4 sample_ddp.py --model DiT-XL/2 --vae ema --num-samples 50000 \\
        --cfg-scale 1.5 --num-sampling-steps 20 --accelerate-method dynamiclayer --path ROUTER \\
        --output samples.npz
    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights WEIGHTS.pth

Sample k depends on (seed, k) alone. Finished batches lie in OUTPUT.parts until all are there; after any
interruption the same command goes on with what is missing, on as many processes as one likes. On a CPU the
file comes out the same byte for byte, whatever the processes and the batch size, and so every process takes
one thread: start as many as there are cores. A GPU may round otherwise for another batch size. Several nodes
need a shared folder. Of a text-to-image model OUTPUT.prompts.txt holds the prompt of every sample.
"""

from common import lifeline  # isort: skip  # noqa: F401  # first: under torchrun this process ends with it

import argparse
import dataclasses
import zlib
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

import execution
from backbones import settings as model_settings
from backbones.contract import Backbone
from backbones.denoiser import check_guidance
from backbones.loading import is_text_model, pixels_of
from backbones.settings import ModelSettings
from common import cli, devices, distributed
from common.distributed import Processes
from common.files import replacing
from common.identity import weights_fingerprint
from execution import settings as execution_settings
from execution.settings import ExecutionSettings
from metrics.clip_score import prompts_as_lines, prompts_beside
from sampling import settings as sampling_settings
from sampling.decoding import image_shape
from sampling.parts import BLOCK, Parts, batches, choose_labels, draw
from sampling.settings import SamplingSettings
from schedules import methods
from schedules import settings as method_settings
from schedules.methods import Method
from schedules.settings import MethodSettings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample many images into one .npz.")
    model_settings.add_arguments(parser, with_vae=True)
    sampling = sampling_settings.add_arguments(
        parser,
        SamplingSettings(cfg_scale=1.5, batch_size=32),
        batch_help=f"images per process and batch, rounded up to a multiple of {BLOCK} (default 32)",
        aliases={"seed": "--global-seed", "batch_size": "--per-proc-batch-size"},
    )
    sampling.add_argument(
        "--num-samples", "--num-fid-samples", type=cli.positive_int, default=50000, help="default 50000"
    )
    sampling.add_argument(
        "--labels",
        choices=("random", "uniform"),
        default="random",
        help="random (the default), or uniform: class k %% classes for sample k",
    )
    method_settings.add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("samples.npz"), help="default samples.npz")
    parser.add_argument("--sample-dir", type=Path, help="folder for --output (default: the current one)")
    execution_settings.add_arguments(parser)
    args = cli.parse(parser)
    if args.output.suffix != ".npz":
        parser.error(f"--output {args.output} does not end in .npz")
    sampling_settings.check_arguments(parser, args)
    method_settings.check_arguments(parser, args)
    model_settings.check_arguments(parser, args)
    if args.sample_dir is not None:
        if args.output.is_absolute():
            args.notes.append(f"--sample-dir has no effect with an absolute --output, {args.output}")
        args.output = args.sample_dir / args.output
    return args


class Job(NamedTuple):
    """All that every process needs to draw its samples."""

    sampling: SamplingSettings
    execution: ExecutionSettings
    method_settings: MethodSettings
    method: Method
    model: Backbone
    texts: list[str]  # the prompts of a text-to-image model
    vae: object  # diffusers' autoencoder, or None
    precision: str
    parts: Parts


def prepare(args: argparse.Namespace, processes: Processes) -> Job:
    """All that can be refused before a file is written."""
    sampling, executing = SamplingSettings.from_arguments(args), ExecutionSettings.from_arguments(args)
    asked = MethodSettings.from_arguments(args)
    precision, dtype = devices.set_precision(executing.precision, processes.device)
    executing = executing.on(processes.device)
    alone = processes.world_size == 1
    chosen = ModelSettings.from_arguments(args)
    texts = chosen.texts if is_text_model(args.model) else []
    model, vae_config = chosen.load(processes.device, dtype, fetch=alone)
    if model.source:
        say(processes, f"weights: {model.source}")
    check_guidance(model, sampling.cfg_scale)
    vae = vae_config and vae_config.load(processes.device, fetch=alone)
    method = methods.load_method(asked, model, sampling, args.model, solve=False)
    for note in method.notes:
        say(processes, note)
    settings = {name: getattr(args, name) for name in ("model", "num_samples", "seed", "labels", "cfg_scale")}
    settings |= {
        "num_sampling_steps": sampling.num_sampling_steps,
        "accelerate_method": asked.name,
        "weights": weights_fingerprint(model),
        "image_size": pixels_of(model),
        "null_label": model.has_null_label,
        "learn_sigma": model.learn_sigma,
        "conditions": model.conditions,
        "vae": vae_config.spec if vae_config else "none",
        "vae_weights": vae and weights_fingerprint(vae),
        "sampler": sampling.sampler,
        "executed_steps": method.diffusion.num_timesteps,
        "schedule": describe(method),
        "precision": precision,
        "quantize": executing.quantize,
        "cache_dtype": executing.cache_dtype,
    }
    if method.dynamic and not method.schedule.per_sample:
        settings["batch_size"] = sampling.batch_size
        say(
            processes,
            f"note: {asked.name} decides for a whole batch, so samples depend on --batch-size; --per-sample "
            "makes each depend on its seed and number alone",
        )
    settings |= methods.calibration(asked)  # what the weights are solved from, which are not known yet
    parts = Parts(args.output, settings, image_shape(model, vae_config), args.num_samples)
    return Job(sampling, executing, asked, method, model, texts, vae, precision, parts)


def describe(method: Method) -> str | None:
    """A schedule in a line that differs where its table or its weights differ."""
    schedule = method.schedule
    if schedule is None:
        return None
    if method.dynamic:
        return repr(schedule)
    table = schedule.compute.numpy().tobytes()
    if schedule.weights is not None:
        table += schedule.weights.numpy().tobytes()
    return f"{schedule.source}, CUR {schedule.cur:.6f}, {zlib.crc32(table):08x}"


def run(args: argparse.Namespace, processes: Processes) -> None:
    job = distributed.together(lambda: prepare(args, processes))
    # What was found by sampling is rank 0's everywhere: another device may round otherwise.
    schedule = distributed.from_main(job.method.schedule)
    job = job._replace(method=dataclasses.replace(job.method, schedule=schedule))
    with job.parts as parts:
        solve = None
        if methods.calibration(job.method_settings):

            def solve() -> Tensor:
                asked = job.method_settings, job.model, job.sampling, job.method
                return methods.solved(*asked).schedule.weights

        is_done = distributed.together(lambda: processes.is_main and parts.open(solve))
        for note in parts.notes:
            print(note, flush=True)
        if distributed.from_main(is_done):
            if processes.is_main:
                write_prompts(args, job)
            say(processes, f"{args.output} holds these samples already")
            return
        method = job.method.with_reuse_weights(distributed.from_main(parts.reuse_weights))
        try:
            draw_all(args, processes, job._replace(method=method))
        except OSError as error:
            raise OSError(
                f"{error}; finished batches are kept, the same command goes on with them"
            ) from error


def draw_all(args: argparse.Namespace, processes: Processes, job: Job) -> None:
    """Draw this process's share of the missing samples; rank 0 then writes the .npz."""
    parts, sampling, method = job.parts, job.sampling, job.method
    sample = execution.prepare(job.execution, job.model, processes.device)
    trajectory = method.trajectory(job.model, sampling)
    if args.random_weights:
        say(processes, cli.RANDOM_WEIGHTS)
    batch_size = -(-sampling.batch_size // BLOCK) * BLOCK
    todo = batches(distributed.from_main(parts.missing()), batch_size, args.num_samples)
    say(
        processes,
        f"{args.num_samples} samples of {args.model}, {method.diffusion.num_timesteps} steps, guidance "
        f"{sampling.cfg_scale:g}, {method.name}; {sum(map(len, todo))} to draw on "
        f"{processes.world_size} processes, {job.precision} on {devices.hardware(processes.device)}",
    )
    mine = todo[processes.rank :: processes.world_size]
    bar = tqdm(total=sum(map(len, mine)), unit="image", disable=None if processes.is_main else True)

    def draw_mine() -> None:
        for samples in mine:
            images = draw(trajectory, sampling.seed, samples, job.vae, args.labels, sample)
            parts.write(samples.start, images)
            bar.update(len(samples))
        bar.close()

    distributed.together(draw_mine)
    if method.dynamic and sum(map(len, todo)):
        reached = method.schedule
        reached.tally.gather(lambda tensor: distributed.summed(tensor.to(processes.device)).cpu())
        faster = method.speedup_macs(job.model, sampling.chain(job.model).num_timesteps)
        say(
            processes,
            f"{reached.source}: {100 * (1 - reached.cur):.2f} % of the branches computed on average, "
            f"{faster:.3f}x by MACs",
        )
    if processes.is_main:  # the others need not wait
        write_prompts(args, job)
        parts.assemble()
        size = "x".join(map(str, parts.image_shape))
        print(f"wrote {args.output}, {args.num_samples} images of {size}")


def write_prompts(args: argparse.Namespace, job: Job) -> None:
    """The prompt of every sample, a line each, beside the .npz; nothing for a model of class labels."""
    if not job.texts:
        return
    labels = choose_labels(job.model, args.labels, job.sampling.seed, range(args.num_samples))
    lines = prompts_as_lines([job.texts[label] for label in labels.tolist()]).encode()
    path = prompts_beside(args.output)
    if not path.is_file() or path.read_bytes() != lines:
        with replacing(path) as temporary:
            temporary.write_bytes(lines)


def say(processes: Processes, text: str) -> None:
    if processes.is_main:
        print(text, flush=True)


def main(args: argparse.Namespace) -> None:
    # Ranks meet when all have drawn their share, which may take days.
    processes = distributed.start(args.device, timedelta(days=7))
    if processes.is_main:
        cli.show_notes(args)
    with devices.one_thread(processes.device):
        run(args, processes)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, parse_args())
