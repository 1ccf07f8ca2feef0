"""What every sampling command shares: models, noise from seeds, the denoising loop, decoding."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
import download
from backbone import Backbone
from cache import Combine, StaticCache
from checkpoints import load_checkpoint
from denoiser import Denoiser, executed, walk
from diffusion import GaussianDiffusion, Sampler, State, as_sampler, create_sampler
from identity import weights_fingerprint as weights_fingerprint  # known by this place too
from models import DiT, DiT_models
from router import Schedule
from vae import VAE_SCALE as VAE_SCALE
from vae import VaeConfig, from_latents, read_vae_config

# Streams of randomness that never meet, whatever the seed.
SAMPLING_STREAM, TRAINING_STREAM, DATA_STREAM, CALIBRATION_STREAM = 0, 1, 2, 3
DIGITS_MODEL = "DiT-digits/2"
_DIGITS_WEIGHTS = Path(__file__).parent / "digits" / "dit.safetensors"
_OFFICIAL = {("DiT-XL/2", 256): "dit-256", ("DiT-XL/2", 512): "dit-512"}


# ---- models ----------------------------------------------------------------------------------------


def build_model(
    name: str,
    image_size: int | None = None,
    num_classes: int | None = None,
    class_dropout_prob: float = 0.1,
    learn_sigma: bool = True,
    vae: VaeConfig | None = None,
) -> DiT:
    """A model of the family with its initial weights, frozen and in eval mode.

    image_size: pixels (default 256); a latent model works on an eighth of it a side, or as the factor of
    `vae` says. class_dropout_prob: 0 for a model without a null label. The digits model has one size and ten
    classes: others are ignored with a warning. Raises ValueError for an unknown name or size, and for a VAE
    with latents of other channels.
    """
    options = {"class_dropout_prob": class_dropout_prob, "learn_sigma": learn_sigma}
    if not is_latent(name):
        if image_size not in (None, 8) or num_classes not in (None, 10):
            warnings.warn(f"{name} draws 8 x 8 pixels of 10 classes; another size or number has no effect")
        model = DiT_models[name](**options)
    else:
        factor = 8 if vae is None else vae.factor
        options |= {"input_size": input_size_of(name, 256 if image_size is None else image_size, factor)}
        model = DiT_models[name](num_classes=1000 if num_classes is None else num_classes, **options)
        model.vae_factor = factor
    if vae is not None:
        vae.check_model(model)
    return model.eval().requires_grad_(False)


def input_size_of(name: str, image_size: int, factor: int) -> int:
    """Side of the latents of `image_size` pixels. Raises ValueError for a size that patches do not fill."""
    patch_size = DiT_models[name].keywords["patch_size"]
    unit = factor * patch_size
    if image_size % unit:
        below = max(1, image_size // unit) * unit
        near = f"{below} or {below + unit}" if below < image_size else f"{below}"
        raise ValueError(
            f"--image-size {image_size}: {name} takes multiples of {unit} pixels (the VAE's factor {factor} "
            f"times patches of {patch_size}); try {near}"
        )
    return image_size // factor


def find_checkpoint(name: str, image_size: int | None, fetch: bool = True) -> Path:
    """The checkpoint that belongs to a model: the digits', or an official one.

    An absent official one is fetched, or with `fetch=False` (several processes would meet) a
    FileNotFoundError.
    """
    if name == DIGITS_MODEL:
        return _DIGITS_WEIGHTS
    official = _OFFICIAL.get((name, image_size or 256))
    if official is None:
        raise ValueError(
            f"there is no official checkpoint of {name} at {image_size or 256} px; give one with --ckpt"
        )
    path = download.FOLDER / download.DOWNLOADS[official][0].path
    if not fetch and not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; fetch it with `python download.py {official}`, or give --ckpt"
        )
    return download.fetch(official)


def load_model(
    name: str,
    ckpt: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    **options,
) -> DiT:
    """A model ready to sample: built, its weights loaded strictly, frozen, on `device` in `dtype`.

    options: those of `build_model` (class_dropout_prob, learn_sigma, vae).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # random weights are the same in every process
        model = build_model(name, image_size, num_classes, **options)
    if random_weights:
        randomize(model)
    else:
        model.source = load_checkpoint(model, ckpt or find_checkpoint(name, image_size))
    return model.to(device=device, dtype=dtype)


def randomize(model: DiT, seed: int = 0) -> None:
    """Give the layers that start at zero (gates, modulations, output) small random weights too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def is_latent(model: DiT | str) -> bool:
    """Whether a model, or the one of a name, works on VAE latents (4 channels or more) rather than on pixels.

    Raises ValueError for an unknown name.
    """
    if isinstance(model, str):
        if model not in DiT_models:
            raise ValueError(f"--model {model} is unknown; choose one of {', '.join(DiT_models)}")
        return DiT_models[model].keywords.get("in_channels", 4) > 3
    return model.in_channels > 3


def pixels_of(model: DiT) -> int:
    """Side of the images in pixels."""
    return model.input_size * model.vae_factor


# ---- noise and labels ------------------------------------------------------------------------------


def sample_generator(seed: int, stream: int, *key: int) -> torch.Generator:
    """A CPU generator for one sample, from the seed, the stream's number and the sample's key within it."""
    state = np.random.SeedSequence(seed, spawn_key=(stream, *key)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def draw_noise(model: DiT, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise (n, C, H, W) on the CPU, one sample from each generator."""
    return torch.stack([torch.randn(model.sample_shape, generator=generator) for generator in generators])


def draw_labels(model: DiT, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform random labels (n,) on the CPU, one from each generator."""
    return torch.stack(
        [torch.randint(model.num_classes, (), generator=generator) for generator in generators]
    )


# ---- the denoising loop ----------------------------------------------------------------------------

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All that fixes a trajectory but its noise and labels: backbone x sampler x schedule.

    sampler: or a chain, for deterministic DDIM on it. cfg_scale: guidance, 1 = off. schedule: which branches
    are computed; None: all. Raises ValueError where the schedule fits neither the backbone nor the sampler.
    """

    backbone: Backbone
    sampler: Sampler
    cfg_scale: float = 1.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", as_sampler(self.sampler))
        schedule, num_steps, branches = self.schedule, self.sampler.num_steps, self.backbone.num_branches
        if schedule is None:
            return
        if schedule.num_steps != num_steps:
            raise ValueError(
                f"the schedule is for {schedule.num_steps} steps, the sampler takes {num_steps}; "
                f"use --num-sampling-steps {schedule.num_steps} or another router"
            )
        if schedule.num_branches != branches:
            raise ValueError(
                f"the schedule is for {schedule.num_branches} branches, the model has {branches}; "
                "use a router trained for this model"
            )

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        chain: GaussianDiffusion,
        cfg_scale: float = 1.0,
        sampler: str = "ddim",
        schedule: Schedule | None = None,
        eta: float = 0.0,
    ) -> "Trajectory":
        """The sampler by name, on a chain. Raises ValueError for an unknown one, or an eta outside [0, 1]."""
        return cls(backbone, create_sampler(sampler, chain, eta), cfg_scale, schedule)

    def cache(self, dtype: torch.dtype | None = None, combine: Combine | None = None) -> StaticCache | None:
        """An empty store for one run; None where every branch is computed."""
        if self.schedule is None:
            return None
        return StaticCache(self.schedule, dtype, combine, self.backbone.device)

    def check(self, labels: Tensor, noise: Tensor) -> None:
        if len(labels) != len(noise):
            raise ValueError(
                f"{len(labels)} labels for {len(noise)} noise samples; give one label per sample"
            )


@torch.no_grad()
def denoise_loop(
    trajectory: Trajectory, labels: Tensor, noise: Tensor, cache=None, step_noise: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Denoise step by step under a cache policy; yields (step, x after it), at last x_0.

    cache: any policy, in place of the trajectory's schedule; None: every branch is computed. step_noise: what
    `draw_step_noise` gives. Nothing in here makes the device wait for the host.
    """
    computed = None if cache is None else cache.computed
    denoise = Denoiser(trajectory.backbone, trajectory.sampler, labels, trajectory.cfg_scale, computed)

    def advance(state: State, step: int) -> State:
        return denoise.advance(state, step, cache, None if step_noise is None else step_noise[step])

    for step, state in walk(advance, denoise.start(noise), executed(denoise.num_steps)):
        yield step, state.x[: len(noise)]


def sample(
    trajectory: Trajectory,
    labels: Tensor,
    noise: Tensor,
    generator: Generators = None,
    cache_dtype: torch.dtype | None = None,
    combine: Combine | None = None,
) -> Tensor:
    """Denoise `noise` (n, C, H, W) under `labels` (n,) to x_0 (n, C, H, W).

    generator: draws the noise that DDPM, or DDIM with eta > 0, adds: one generator for the batch (None:
    torch's global one), or one per sample, so that a sample does not depend on its batch. cache_dtype: dtype
    of the stored branch outputs, None: the model's. combine: what combines them, as `cache.StaticCache` takes
    it. Raises ValueError where labels and noise do not fit.
    """
    trajectory.check(labels, noise)
    step_noise = draw_step_noise(trajectory, noise, generator)
    cache = trajectory.cache(cache_dtype, combine)
    *_, (_, x_0) = denoise_loop(trajectory, labels, noise, cache, step_noise)
    return x_0


Sample = Callable[[Trajectory, Tensor, Tensor, Generators], Tensor]  # `sample`, or what stands for it


def generate(
    model: Backbone,
    diffusion: GaussianDiffusion,
    labels: Tensor,
    noise: Tensor,
    cfg_scale: float = 1.0,
    sampler: str = "ddim",
    schedule: Schedule | None = None,
    eta: float = 0.0,
    generator: Generators = None,
    progress: bool = False,
) -> Tensor:
    """x_0 (n, C, H, W) of noise (n, C, H, W) under labels (n,), as `Trajectory.of` and `sample` have it.

    sampler: "ddim" (with `eta`) or "ddpm". schedule: which branches to compute; None computes all. progress:
    show a bar over the steps. Raises ValueError where schedule, labels or sampler do not fit the model or the
    chain.
    """
    trajectory = Trajectory.of(model, diffusion, cfg_scale, sampler, schedule, eta)
    trajectory.check(labels, noise)
    step_noise = draw_step_noise(trajectory, noise, generator)
    steps = denoise_loop(trajectory, labels, noise, trajectory.cache(), step_noise)
    *_, (_, x_0) = tqdm(steps, total=diffusion.num_timesteps, unit="step", disable=None if progress else True)
    return x_0


def generate_seeded(
    trajectory: Trajectory,
    labels: Tensor,
    seed: int,
    batch_size: int | None = None,
    progress: bool = False,
    first: int = 0,
    sample: Sample = sample,
) -> Tensor:
    """x_0 (n, C, H, W) for labels (n,), those of samples first .. first + n; k depends on (seed, k) alone.

    So methods are compared on the same noise, whatever their batch size. sample: the function above, or one
    of `execution.py` that stands for it. Works on the model's device. Raises ValueError where a sample is not
    finite, naming it.
    """
    device, batch_size = trajectory.backbone.device, batch_size or len(labels)
    parts = []
    for start in tqdm(range(0, len(labels), batch_size), desc="batches", disable=None if progress else True):
        y = labels[start : start + batch_size].to(device)
        generators = [sample_generator(seed, SAMPLING_STREAM, first + start + k) for k in range(len(y))]
        noise = draw_noise(trajectory.backbone, generators).to(device)
        parts.append(sample(trajectory, y, noise, generators))
    x_0 = torch.cat(parts)
    require_finite(x_0, first)
    return x_0


def draw_step_noise(trajectory: Trajectory, noise: Tensor, generator: Generators) -> Tensor | None:
    """Fresh noise (T, N, C, H, W) for every step, N = n or 2n; None where the sampler adds none.

    All of it is drawn before the first step, in the order of execution, or the device would wait for the host
    at each step. From one generator both halves of a guided batch draw, as in the official sampler. Only the
    first half of x_t is ever read, so with one generator per sample the halves share their noise.
    """
    if not trajectory.sampler.adds_noise:
        return None
    halves = 1 if trajectory.cfg_scale == 1 else 2
    shape = (halves * len(noise), *noise.shape[1:])

    def draw() -> Tensor:
        if generator is None:
            return torch.randn(shape, device=noise.device, dtype=noise.dtype)
        if isinstance(generator, torch.Generator):
            return torch.randn(shape, generator=generator, device=generator.device)
        own = [torch.randn(shape[1:], generator=one, device=one.device) for one in generator]
        return torch.cat([torch.stack(own)] * halves)

    drawn = [draw() for _ in range(trajectory.sampler.num_steps)]
    return torch.stack(drawn[::-1]).to(noise.device)


# ---- decoding --------------------------------------------------------------------------------------


def choose_vae(given: str | None, model: DiT | str, random_weights: bool) -> str:
    """The spec for `load_vae`: what `--vae` gave, or its default; `none` for a model of pixels."""
    if is_latent(model):
        return given or ("none" if random_weights else "ema")
    if given not in (None, "none"):
        warnings.warn(f"--vae {given} has no effect: this model works on pixels", stacklevel=2)
    return "none"


def load_vae(spec: str, device: torch.device | str = "cpu", fetch: bool = True):
    """diffusers' autoencoder for a spec, as `vae.read_vae_config` reads it. None for `none`."""
    config = read_vae_config(spec)
    return None if config is None else config.load(device, fetch)


def image_shape(model: DiT, vae: VaeConfig | None) -> tuple[int, int, int]:
    """(H, W, C) of what `decode` returns."""
    if vae is not None:
        return (model.input_size * vae.factor, model.input_size * vae.factor, vae.image_channels)
    return (model.input_size, model.input_size, min(model.in_channels, 3))


def require_finite(x: Tensor, first: int = 0, what: str = "x_0") -> None:
    """Raise ValueError where a sample of x (n, ...) holds NaN or infinity; the samples count from `first`.

    Waits for the device: for after the loop.
    """
    if bool(x.isfinite().all()):
        return
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    others = f" (and {len(bad) - 1} more of {len(x)})" if len(bad) > 1 else ""
    raise cli.OneProcessError(
        f"sample {first + bad[0]}{others}: {what} is not finite (NaN or infinite), so nothing of it is kept; "
        "try --precision fp32, a --cfg-scale nearer to 1, or another checkpoint"
    )


@torch.no_grad()
def decode(x_0: Tensor, vae=None, batch_size: int = 8, first: int = 0) -> Tensor:
    """uint8 images (n, H, W, 3 or 1) of x_0 (n, C, H, W), the samples `first` and on.

    With a VAE, latents are decoded; pixels (C < 4) are only scaled from [-1, 1]; latents without a VAE are
    previewed by their first three channels, the range -3 .. 3 shown from black to white. Raises ValueError
    where x_0 or an image is not finite, naming the sample.
    """
    require_finite(x_0, first)
    if vae is not None:
        parts = from_latents(x_0, vae).split(batch_size)
        x_0 = torch.cat([vae.decode(part).sample for part in parts])
        require_finite(x_0, first, "the decoded image")
    elif x_0.shape[1] > 3:
        x_0 = x_0[:, :3] / 3.0
    pixels = ((x_0.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu()
