"""CLIP score (Hessel et al. 2021): how well pictures show what their prompts say.

A sample's score is 100 times the cosine between the embeddings of its picture and of its prompt, neither
scaled by 2.5 nor cut at 0. transformers loads the CLIP; scores of different ones do not compare.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import cli
from common.files import first_line
from common.images import Images
from metrics.checks import require_finite, require_finite_weights

DEFAULT = "openai/clip-vit-large-patch14"  # that of torchmetrics


class ClipScorer:
    """CLIP as a function of pictures and prompts.

    source: a folder with CLIPModel and CLIPProcessor, or its id on the Hub. Raises OSError or ValueError in
    one line where it cannot be had, or is no whole CLIP.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        transformers = cli.require("transformers", "--clip")
        remedy = f"give the folder of a CLIP model; `hf download {DEFAULT}` fetches the default"
        try:
            kind = transformers.AutoConfig.from_pretrained(source).model_type
            if kind != "clip":
                raise ValueError(f"it is of type {kind}, not clip")
            model, found = transformers.CLIPModel.from_pretrained(source, output_loading_info=True)
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"{len(missing)} of its tensors are missing, such as {missing[0]}")
            processor = transformers.CLIPProcessor.from_pretrained(source)
        except Exception as error:  # damaged folders fail in as many ways as they have files
            reason = first_line(error)
            raise OSError(f"--clip {source} cannot be loaded ({reason}); {remedy}") from None
        require_finite_weights(model.state_dict(), source)
        self.source, self._device = source, device
        self._model = model.float().to(device).eval().requires_grad_(False)
        self._tokenizer, self._pictures = processor.tokenizer, processor.image_processor
        self.num_tokens = model.config.text_config.max_position_embeddings

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoder reads; the rest of them does not count."""
        tokens = self._tokenizer(list(prompts), verbose=False)["input_ids"]
        return sum(len(one) > self.num_tokens for one in tokens)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (n,) in float64 of uint8 images (n, H, W, C) under their prompts."""
        colour = images.expand(*images.shape[:3], 3).numpy()  # grey images in three equal channels
        pixels = self._pictures([Image.fromarray(one) for one in colour], return_tensors="pt")
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.num_tokens,
            return_tensors="pt",
        )  # fmt: skip
        output = self._model(
            input_ids=tokens.input_ids.to(self._device),
            attention_mask=tokens.attention_mask.to(self._device),
            pixel_values=pixels.pixel_values.to(self._device),
        )
        embeddings = output.image_embeds.double(), output.text_embeds.double()
        return 100 * torch.cosine_similarity(*embeddings).cpu()


def clip_scores(images: Images, prompts: Sequence[str], scorer: ClipScorer, batch_size: int) -> Tensor:
    """Scores (n,) of all images. Raises ValueError where a score is not finite, naming its image."""
    scores: list[Tensor] = []
    first = 0
    bar = tqdm(total=len(images), desc=f"CLIP of {images.path.name}", unit="image", disable=None)
    for batch in images.batches(batch_size):
        scores.append(scorer(batch, prompts[first : first + len(batch)]))
        require_finite(scores[-1], f"{images.path}: CLIP scores", first)
        first += len(batch)
        bar.update(len(batch))
    bar.close()
    return torch.cat(scores)


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of values (n,) and its standard error, None for one value."""
    error = None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()
    return values.mean().item(), error


def figures(scores: Tensor, paired: Tensor | None = None) -> dict[str, float | None]:
    """The mean score with its standard error, and those of the differences to paired samples."""
    sets = {"clip_score": scores}
    if paired is not None:
        sets |= {"clip_score_paired": paired, "clip_score_difference": scores - paired}
    result = {}
    for name, values in sets.items():
        result[name], result[f"{name}_error"] = mean_and_error(values)
    return result


# ---- prompts of pictures ---------------------------------------------------------------------------


def prompts_beside(samples: Path) -> Path:
    """The file of the prompts of a file of samples, one line a picture."""
    return samples.with_name(f"{samples.name}.prompts.txt")


def prompts_as_lines(prompts: Sequence[str]) -> str:
    """One line a prompt, whatever white space is in it; CLIP reads a line break as a space."""
    return "".join(" ".join(prompt.split()) + "\n" for prompt in prompts)


def read_lines(path: Path) -> list[str]:
    """The lines of a file of prompts, empty ones too. Raises OSError or ValueError, naming the file."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); give one prompt a line") from None


def prompts_of(images: Images, given: Path | None) -> list[str]:
    """One prompt for every image, from a given file or from the one beside the samples.

    Raises OSError or ValueError where there is none, or where their numbers differ.
    """
    path = given or prompts_beside(images.path)
    if not given and not path.is_file():
        raise FileNotFoundError(
            f"--clip needs the prompts of {images.path}, and {path} does not exist; give --prompts FILE, a "
            "line for each picture"
        )
    prompts = read_lines(path)
    if len(prompts) != len(images):
        raise ValueError(
            f"{path} holds {len(prompts)} prompts, {images.path} {len(images)} pictures; give a line for "
            "each picture"
        )
    return prompts
