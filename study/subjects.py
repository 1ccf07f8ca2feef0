"""What studies are about: an example's model, its judge, and how its rows are sampled by default.

The judge is the one that the example registers (`common/registry.py` says what a judge is), the plan is
`study/plan.py` or a module of its own.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

import examples.digits
import examples.emoji
from backbones.contract import Backbone
from backbones.settings import ModelSettings
from common import registry
from common.identity import weights_fingerprint
from sampling.decoding import decode
from sampling.settings import SamplingSettings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Subject:
    """name: the value of `--example`. sampling, samples: the defaults of a measurement. prompts: a file.

    title, about: of the report. shown: samples of every method that the report draws.
    """

    name: str
    model: str
    title: str
    about: str
    sampling: SamplingSettings
    samples: int
    prompts: Path | None = None
    shown: int = 10

    @property
    def evidence(self) -> Path:
        """The folder of the committed study."""
        return ROOT / "study" / "results" / self.name

    def results(self, quick: bool = False) -> Path:
        """Where a study goes by default; results/emoji itself is the folder of the data."""
        name = self.name if self is DIGITS else f"{self.name}-study"
        return ROOT / "results" / (f"{name}-quick" if quick else name)

    def load(self) -> tuple[Backbone, Any]:
        """A model of its own, ready to sample, and its VAE; None for a model of pixels."""
        model, vae = ModelSettings(self.model, prompts=self.prompts).load()
        return model, vae and vae.load()

    def decode(self, x_0: Tensor) -> Tensor:
        """uint8 images (n, H, W, C)."""
        return decode(x_0, parts(self)[1])


@cache
def parts(subject: Subject) -> tuple[Backbone, Any]:
    """The model and the VAE of a subject, loaded once a process."""
    return subject.load()


@cache
def judge(subject: Subject) -> Any:
    return registry.judge(subject.model)


@cache
def fingerprint(subject: Subject) -> str:
    """Of the weights of its model."""
    return weights_fingerprint(parts(subject)[0])


DIGITS = Subject(
    "digits",
    examples.digits.MODEL,
    "Caching methods on the digits DiT",
    "Model: the digits DiT. Sampling: DDIM without guidance unless a row says otherwise",
    SamplingSettings("10", cfg_scale=1.0, seed=1234, batch_size=250),
    2000,
)
EMOJI = Subject(
    "emoji",
    examples.emoji.MODEL,
    "Caching methods on the emoji PixArt",
    "Model: the emoji PixArt. Sampling: DPM-Solver++ with guidance 4.5 unless a row says otherwise",
    SamplingSettings("20", sampler="dpm-solver++", cfg_scale=4.5, seed=1234, batch_size=50),
    500,
    examples.emoji.FOLDER / "prompts" / "study.txt",
    shown=8,
)
SUBJECTS = {subject.name: subject for subject in (DIGITS, EMOJI)}
