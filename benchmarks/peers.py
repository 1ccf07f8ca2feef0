"""How fast schedules through hooks are beside uncached diffusers, cache-dit and our own DiT, in one run.

    python -m benchmarks.peers --model PixArt-Sigma-512 --blocks 4
    python -m benchmarks.peers --model PixArt-Sigma-1024 --precision bf16 --device cuda --output peers.json
    python -m benchmarks.peers --model DiT-XL-2-256 --blocks 4

All rows of a run have the same random weights, condition and noise, guidance and number of steps, and take
turns (A B A B). PixArt runs in diffusers' own pipeline with DPM-Solver++; DiT in the loop of diffusers'
pipeline with its `DDIMScheduler`, without the VAE.

| row | what runs |
|---|---|
| `diffusers` | diffusers untouched |
| `all` | a schedule that computes everything: what hooks cost |
| `random:X`, `fora:2` | a random share X of the cells is reused, or every other step |
| `cache-dit` | PixArt: its DBCache with the steps of fora:2 by its mask; its first block always runs |
| `as cache-dit` | hooks with the cells that cache-dit computes |
| `ours`, `ours random:X`, ... | DiT: `models.DiT` with the same weights and schedule, in our loop |

cache-dit (`pip install cache-dit`) is left out where it is not installed. `share` is the computed share of
the branches' MACs, `ratio` the measured speed-up over what the MACs promise, `difference` how far the result
is from that of the same schedule through hooks (relative). The last line is JSON.
"""

import argparse
import importlib.metadata
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.checkpoints import from_diffusers
from backbones.contract import Backbone
from backbones.diffusers_dit import DiffusersDiT, as_official
from backbones.hooks import Session, scheduled
from backbones.pixart import PixArt, random_pixart, random_prompts
from backbones.pixart_models import PIXART
from common import cli, devices
from common.columns import aligned
from common.files import check_writable, to_json, write_json
from common.timing import alternating, latency
from diffusion import NUM_TIMESTEPS, create_diffusion
from models import DiT
from router import Schedule
from sampling.loop import Trajectory, sample
from schedules.baselines import fora_schedule, random_schedule

CFG_SCALE, SEED = 4.5, 0
DIT = {"DiT-XL-2-256": 256, "DiT-XL-2-512": 512}  # pixels
LIBRARIES = ("torch", "diffusers", "cache-dit")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hooks beside uncached diffusers, cache-dit and our DiT.")
    parser.add_argument("--model", choices=(*PIXART, *DIT), default="PixArt-Sigma-512")
    parser.add_argument("--blocks", type=cli.positive_int, default=28, help="of the model (default: all 28)")
    parser.add_argument("--num-sampling-steps", type=cli.positive_int, default=20)
    parser.add_argument("--batch-size", type=cli.positive_int, default=1, help="images (default 1)")
    parser.add_argument("--repeats", type=cli.positive_int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    devices.add_arguments(parser)
    return parser.parse_args()


class Run:
    """One row: what is called, the schedule that it follows, and the model whose MACs count."""

    def __init__(self, call: Callable[[], Tensor], schedule: Schedule, model: Backbone):
        self.call, self.model = call, model
        self.speedup_macs = schedule.speedup_macs(model)
        macs = torch.tensor(model.branch_macs)
        self.share = ((schedule.compute.long() @ macs).sum() / (schedule.num_steps * macs.sum())).item()


class Peer(ABC):
    """A model of diffusers with random weights, and a request that is always the same.

    model: it as a backbone, for its MACs, without its hooks; args: those of the command.
    """

    model: Backbone

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        self.args, self.device, self.dtype = args, device, dtype

    @abstractmethod
    def plain(self) -> Tensor:
        """The result x_0 without any schedule of ours."""

    @abstractmethod
    def hooked(self, schedule: Schedule) -> Tensor:
        """The same under a schedule; hooks are applied and taken away within the call."""

    @abstractmethod
    def further(self, chosen: dict[str, Schedule]) -> Iterator[tuple[str, Run]]:
        """Rows beside those of diffusers and of hooks."""

    def runs(self) -> dict[str, Run]:
        """All rows by name; `diffusers` is the one that they are compared with."""
        chosen = schedules(self.args.num_sampling_steps, self.model.num_branches)
        found = {"diffusers": Run(self.plain, chosen["all"], self.model)}
        for name, schedule in chosen.items():
            found[name] = Run(partial(self.hooked, schedule), schedule, self.model)
        return found | dict(self.further(chosen))


class PixArtPeer(Peer):
    """PixArt in diffusers' pipeline, beside cache-dit."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline  # slow to import

        super().__init__(args, device, dtype)
        known, n = PIXART[args.model], args.batch_size
        transformer = random_pixart(args.model, num_layers=args.blocks).to(device, dtype)
        prompts = random_prompts(n, known.num_tokens)
        self.pipe = PixArtSigmaPipeline(None, None, None, transformer, DPMSolverMultistepScheduler())
        self.pipe.set_progress_bar_config(disable=True)
        states, mask = prompts.batch([*range(n), *[n] * n])
        states, mask = states.to(device, dtype), mask.to(device)
        side = known.pixels // 8
        self.noise = seeded_noise(n, side).to(device, dtype)
        self.request = {
            "prompt_embeds": states[:n], "prompt_attention_mask": mask[:n], "negative_prompt": None,
            "negative_prompt_embeds": states[n:], "negative_prompt_attention_mask": mask[n:],
            "num_inference_steps": args.num_sampling_steps, "guidance_scale": CFG_SCALE,
            "height": known.pixels, "width": known.pixels, "use_resolution_binning": False,
            "output_type": "latent",
        }  # fmt: skip
        self.model = PixArt(transformer, prompts)
        self.model.close()

    def plain(self) -> Tensor:
        return self.pipe(**self.request, latents=self.noise.clone()).images

    def hooked(self, schedule: Schedule) -> Tensor:
        with scheduled(self.pipe, schedule):
            return self.plain()

    def further(self, chosen: dict[str, Schedule]) -> Iterator[tuple[str, Run]]:
        if "cache-dit" not in versions():
            print("cache-dit is not installed and left out: pip install cache-dit")
            return
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
        compute = chosen["fora:2"].compute.clone()
        steps = compute[:, 0].flip(0).tolist()  # in the order of execution
        compute[:, : self.model.num_branches // self.args.blocks] = True  # its first block
        same = Schedule(compute)

        def run() -> Tensor:
            with self.cache_dit(steps):
                return self.plain()

        yield "cache-dit", Run(run, same, self.model)
        yield "as cache-dit", Run(partial(self.hooked, same), same, self.model)

    @contextmanager
    def cache_dit(self, executed: list[bool]) -> Iterator[None]:
        """executed: the steps that compute all blocks; the others compute one."""
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9, max_warmup_steps=1,
            num_inference_steps=len(executed), steps_computation_mask=[int(one) for one in executed],
            steps_computation_policy="static",
        )  # fmt: skip
        cache_dit.enable_cache(self.pipe, cache_config=config)
        try:
            yield
        finally:
            cache_dit.disable_cache(self.pipe)


class DiTPeer(Peer):
    """DiT in the loop of diffusers' pipeline, beside our own DiT with the same weights."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        from diffusers import DDIMScheduler  # slow to import

        super().__init__(args, device, dtype)
        if NUM_TIMESTEPS % args.num_sampling_steps:  # else the library and we space the steps differently
            raise ValueError(
                f"--num-sampling-steps {args.num_sampling_steps} does not divide {NUM_TIMESTEPS}, which "
                f"{args.model} needs here; give 10 or 20"
            )
        side, n = DIT[args.model] // 8, args.batch_size
        transformer = random_dit(side, args.blocks)
        self.ours = DiT(input_size=side, depth=args.blocks).eval().requires_grad_(False)
        state = from_diffusers(transformer.state_dict()) | {"pos_embed": self.ours.pos_embed}
        self.ours.load_state_dict(state, strict=True)
        self.ours.to(device, dtype)
        self.transformer = transformer.to(device, dtype)
        self.model = DiffusersDiT(self.transformer)
        self.model.close()
        self.labels = torch.arange(n, device=device) % self.ours.num_classes
        self.noise = seeded_noise(n, side).to(device)
        self.chain = create_diffusion(f"ddim{args.num_sampling_steps}")  # spaced as in diffusers
        self.scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
        self.scheduler.set_timesteps(args.num_sampling_steps)

    def plain(self) -> Tensor:
        return self.loop()

    @torch.no_grad()
    def loop(self, session: Session | None = None) -> Tensor:
        """The loop of `DiTPipeline.__call__`, up to the VAE, with the official guidance in three channels."""
        n, null = len(self.labels), torch.full_like(self.labels, self.ours.num_classes)
        labels, x = torch.cat([self.labels, null]), torch.cat([self.noise, self.noise])
        if session is not None:
            session.start()
        for t in self.scheduler.timesteps:
            x = torch.cat([x[:n], x[:n]])
            timestep = t[None].to(x.device).expand(2 * n)
            output = self.transformer(x.to(self.dtype), timestep=timestep, class_labels=labels).sample
            noise = self.model.guide(output, CFG_SCALE)[:, : x.shape[1]]
            x = self.scheduler.step(noise, t, x).prev_sample
        return x[:n]

    def hooked(self, schedule: Schedule) -> Tensor:
        with scheduled(self.transformer, schedule) as session:
            return self.loop(session)

    def further(self, chosen: dict[str, Schedule]) -> Iterator[tuple[str, Run]]:
        for name, schedule in chosen.items():
            plain = name == "all"
            own = Trajectory.of(self.ours, self.chain, CFG_SCALE, schedule=None if plain else schedule)
            run = partial(sample, own, self.labels, self.noise)
            yield "ours" if plain else f"ours {name}", Run(run, schedule, self.ours)


def random_dit(side: int, blocks: int) -> nn.Module:
    """diffusers' DiT-XL/2 for latents of `side`, with seeded random weights and the official constants."""
    from diffusers import DiTTransformer2DModel  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        transformer = DiTTransformer2DModel(out_channels=8, sample_size=side, num_layers=blocks)
    first, *others = transformer.transformer_blocks
    for block in others:  # one embedder for all, as in the official model
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return as_official(transformer).eval().requires_grad_(False)


def seeded_noise(n: int, side: int) -> Tensor:
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(SEED))


def schedules(num_steps: int, num_branches: int) -> dict[str, Schedule]:
    size = num_steps, num_branches
    return {
        "all": Schedule(torch.ones(size, dtype=torch.bool)),
        "random:0.375": random_schedule(*size, 0.375, SEED),
        "random:0.5": random_schedule(*size, 0.5, SEED),
        "fora:2": fora_schedule(*size, 2),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def difference(name: str, results: dict[str, Tensor]) -> float | None:
    """How far a result is from that of hooks under the same schedule, relative; None: nothing is the same."""
    other = {"diffusers": "all", "ours": "all", "cache-dit": "as cache-dit"}.get(name)
    other = other or (name.removeprefix("ours ") if name.startswith("ours ") else None)
    if other is None:
        return None
    own, hooks = results[name].double(), results[other].double()
    return ((own - hooks).norm() / hooks.norm()).item()


COLUMNS = (
    ("method", lambda row: row["method"]),
    ("share", lambda row: f"{row['share']:.3f}"),
    ("ms", lambda row: f"{row['ms']:,.1f} ({row['ms_least']:,.1f} to {row['ms_most']:,.1f})"),
    ("speed-up", lambda row: f"{row['speedup_latency']:.3f}x"),
    ("by MACs", lambda row: f"{row['speedup_macs']:.3f}x"),
    ("ratio", lambda row: f"{row['ratio']:.3f}"),
    ("difference", lambda row: "-" if row["difference"] is None else f"{row['difference']:.1e}"),
)


def main(args: argparse.Namespace) -> None:
    device = devices.choose_device(args.device)
    precision, dtype = devices.set_precision(args.precision, device)
    if args.output:
        check_writable(args.output, [".json"])
    runs = (DiTPeer if args.model in DIT else PixArtPeer)(args, device, dtype).runs()
    results = {name: run.call() for name, run in runs.items()}  # the warm-up
    calls = [run.call for run in runs.values()]
    seconds = dict(zip(runs, alternating(calls, args.repeats, device, warm_up=0), strict=True))
    rows = []
    for name, run in runs.items():
        row = {"method": name, "share": run.share} | latency(seconds[name], seconds["diffusers"])
        row |= {"speedup_macs": run.speedup_macs, "difference": difference(name, results)}
        row["ratio"] = row["speedup_latency"] / row["speedup_macs"]
        rows.append(row)
    print(aligned(rows, COLUMNS))
    result = {
        "model": args.model, "blocks": args.blocks, "num_steps": args.num_sampling_steps,
        "batch_size": args.batch_size, "cfg_scale": CFG_SCALE, "seed": SEED, "repeats": args.repeats,
        "precision": precision, "dtype": str(dtype).removeprefix("torch."),
        "hardware": devices.hardware(device), "versions": versions(), "rows": rows,
    }  # fmt: skip
    if args.output:
        write_json(args.output, result)
    print(to_json(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
