"""The data of Learning-to-Cache: a folder of pictures that a VAE encodes, latents, or an example's data.

`numbered_batches` hands out samples by their number in the training alone. So a resumed run, or one on more
processes, sees the same samples.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from backbones.loading import is_latent, pixels_of
from backbones.vae import VAE_SCALE, to_latents
from common import lifeline, registry
from common.arrays import ArrayFile
from common.images import open_picture
from metrics.checks import require_finite
from models import DiT
from sampling.seeds import DATA_STREAM, sample_generator


def open_data(spec: str, model: DiT) -> Dataset:
    """Samples (x, label) of an example by its name, an image folder (one per class), or an .npz of latents.

    x from an image folder is uint8 (3, H, W), which `to_model_space` turns into what the model denoises;
    otherwise it is that already, (C, H, W). An .npz holds `latents` (n, C, H, W), scaled as the model has
    them, and `labels` (n,). Raises FileNotFoundError or ValueError where the data are absent or do not have
    the model's shape.
    """
    path, own = Path(spec), registry.data()
    if spec in own:
        x, labels = own[spec]()
        if labels.max() >= model.num_classes:
            raise ValueError(
                f"--data {spec} has labels up to {labels.max()}, the model {model.num_classes} classes or "
                "prompts; give the model, or the file of prompts, that they belong to"
            )
        data = TensorDataset(x, labels)
    elif path.is_file():
        data = _read_latents(path, model.num_classes)
    elif path.is_dir():
        if not is_latent(model):
            raise ValueError(
                f"--data {spec}: this model draws {model.in_channels}-channel pixels; use {' or '.join(own)}"
            )
        data = _image_folder(path, pixels_of(model))
        if len(data.classes) != model.num_classes:
            raise ValueError(
                f"--data {spec} has {len(data.classes)} folders, the model {model.num_classes} classes; "
                "give one folder a class, in the order of the labels (they may be empty)"
            )
        if not len(data):
            raise ValueError(f"--data {spec} holds no images; give an ImageFolder tree")
        return data
    else:
        names = " or ".join(own)
        raise FileNotFoundError(f"--data {spec} does not exist; give an image folder, an .npz or {names}")
    shape, wanted = tuple(data[0][0].shape), (model.in_channels, model.input_size, model.input_size)
    if shape != wanted:
        raise ValueError(f"--data {spec} holds samples of shape {shape}, the model denoises {wanted}")
    return data


def are_pictures(data: Dataset) -> bool:
    """Whether the samples of `open_data` are pictures; none of them is read."""
    return not isinstance(data, TensorDataset)


def _read_latents(path: Path, num_classes: int) -> TensorDataset:
    """The samples of an .npz: `latents` of any real floating point, `labels` of any integers."""
    file = ArrayFile(path, f"--data {path}")
    if not file.is_npz:
        raise ValueError(f"--data {path} cannot be read as an .npz; write it with np.savez")
    if not {"latents", "labels"} <= set(file.names):
        raise ValueError(f"--data {path} holds {file.contents}; `latents` and `labels` are needed")
    latents, labels = file.read("latents", "f", "(n, C, H, W)"), file.read("labels", "iu", "(n,)")
    if not len(latents) or len(latents) != len(labels) or not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"--data {path} has {len(latents)} latents and {len(labels)} labels; as many are needed, the "
            f"labels within 0 .. {num_classes - 1}"
        )
    x = torch.from_numpy(latents.astype(np.float32, copy=False))
    require_finite(x, f"--data {path}: latents")
    if (spread := x[:1000].std().item()) > 3:  # unscaled latents of the DiT's VAE have 5.5
        warnings.warn(
            f"--data {path}: latents have a standard deviation of {spread:.1f}, models have about 1; "
            f"multiply them by the VAE's scaling factor, {VAE_SCALE} for --vae ema and mse",
            stacklevel=2,
        )
    return TensorDataset(x, torch.from_numpy(labels.astype(np.int64)))


def _image_folder(path: Path, size: int) -> Dataset:
    from torchvision.datasets import ImageFolder  # slow to import, and only this needs it

    def to_tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(center_crop(image.convert("RGB"), size))).permute(2, 0, 1)

    return ImageFolder(str(path), transform=to_tensor, loader=open_picture, allow_empty=True)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image at `size` pixels: halved while twice too large, then resized, then cut.

    ADM and DiT were trained with this preprocessing.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _Numbered(Dataset):
    """An endless stream of samples by their number, with a new order of the data in every epoch."""

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed = data, seed
        self._order: tuple[int, Tensor | None] = (-1, None)

    def __getitem__(self, number: int):
        epoch, position = divmod(number, len(self.data))
        if self._order[0] != epoch:
            generator = sample_generator(self.seed, DATA_STREAM, epoch)
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        try:
            return self.data[int(self._order[1][position])]
        except OSError as error:  # raised in a worker, it would arrive as a traceback
            return error


def _collate(samples: list) -> tuple[Tensor, Tensor] | OSError:
    """A batch, or the first error among its samples."""
    errors = [sample for sample in samples if isinstance(sample, OSError)]
    return errors[0] if errors else default_collate(samples)


class _Batches:
    """The sample numbers of one process, batch after batch from batch `first` on, without an end."""

    def __init__(self, first: int, global_batch_size: int, rank: int, world_size: int):
        self.first, self.global_batch_size = first, global_batch_size
        self.local = global_batch_size // world_size
        self.offset = rank * self.local

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.first
        while True:
            start = batch * self.global_batch_size + self.offset
            yield list(range(start, start + self.local))
            batch += 1


def numbered_batches(
    data: Dataset, seed: int, first: int, global_batch_size: int, rank: int, world_size: int, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, labels) of this process from batch `first` on; the seed decides what they hold.

    Raises OSError for a picture that cannot be read, at its batch, with and without loading processes.
    """
    batches = _Batches(first, global_batch_size, rank, world_size)
    data = _Numbered(data, seed)
    options = {"num_workers": num_workers, "worker_init_fn": _follow_trainer if num_workers else None}
    loader = iter(DataLoader(data, batch_sampler=batches, collate_fn=_collate, **options))
    try:
        while True:
            batch = _next_batch(loader)
            if isinstance(batch, OSError):
                raise batch
            yield batch
    finally:
        del loader  # ends the workers, which the error's traceback would keep


def _next_batch(loader: Iterator) -> tuple[Tensor, Tensor] | OSError:
    try:
        return next(loader)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        return OSError(f"{reason}; is memory short? --num-works 0 reads without workers")


def _follow_trainer(_worker: int) -> None:
    """A loading process ends when the training process does."""
    lifeline.follow_starter()


@torch.no_grad()
def to_model_space(x: Tensor, vae, generators: list[torch.Generator]) -> Tensor:
    """What the model denoises: uint8 pictures are flipped at random and encoded, other data are kept."""
    if x.dtype != torch.uint8:
        return x
    flipped = torch.tensor([bool(torch.rand((), generator=one) < 0.5) for one in generators], device=x.device)
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    posterior = vae.encode(x.float() / 127.5 - 1).latent_dist
    noise = [torch.randn(posterior.mean.shape[1:], generator=one) for one in generators]
    return to_latents(posterior.mean + posterior.std * torch.stack(noise).to(x.device), vae)
