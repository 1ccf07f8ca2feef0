"""The examples' models, weights, data, features and routers, by name.

An example is a folder of `examples/` whose `__init__.py` holds a record EXAMPLE. The record is plain values,
so reading it costs nothing; code is named as "module:function" and imported when it is called for.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "examples"


@dataclass(frozen=True)
class Preset:
    """A DiT of an example. options: arguments of `models.DiT`; weights: its file; in_pixels: without VAE."""

    options: Mapping[str, int]
    weights: Path
    in_pixels: bool = False


@dataclass(frozen=True)
class TextModel:
    """A text-to-image model of an example, as a pipeline's folder of diffusers.

    folder: with `transformer` and `vae`. num_tokens: of a prompt. captions: a file of prompts that are
    encoded already (`backbones/captions.py`). text_encoder: "module:function" that returns the folder or the
    Hub id of the encoder of any other prompt. remedy, encoder_remedy: what to do where the weights, or the
    encoder, are not there.
    """

    folder: Path
    num_tokens: int
    captions: Path
    text_encoder: str
    remedy: str
    encoder_remedy: str

    @property
    def is_there(self) -> bool:
        """Whether the folder has a transformer's config and weights."""
        folder = self.folder / "transformer"
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))

    def find_encoder(self) -> str:
        return _calling(self.text_encoder)()


@dataclass(frozen=True)
class Example:
    """One folder of `examples/`.

    presets, text_models: by the value of `--model`. data: by the value of `--data`, a function without
    arguments that returns samples (n, C, H, W) as the model denoises them and labels (n,). features: by the
    value of `--features`, a function without arguments that returns a `metrics.features.Extractor`. routers:
    a folder of router files; their names are values of `--path`. judges: by model, a function without
    arguments that returns what a study judges samples by: `features(x_0, images)` gives features (n, D) of
    samples and their uint8 images, `figures(features, labels)` floats by name, and `compared` names those
    that are wanted of the uncached samples too.
    """

    presets: Mapping[str, Preset] = field(default_factory=dict)
    text_models: Mapping[str, TextModel] = field(default_factory=dict, kw_only=True)
    data: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    routers: Path | None = None
    judges: Mapping[str, str] = field(default_factory=dict, kw_only=True)


@cache
def examples() -> tuple[Example, ...]:
    """The records of all examples, in the order of their folders' names.

    Raises ValueError for a folder without a record, and where two examples give one name to different things.
    """
    folders = importlib.import_module(PACKAGE).__path__
    modules = [importlib.import_module(f"{PACKAGE}.{found.name}") for found in pkgutil.iter_modules(folders)]
    taken: dict[tuple[str, str], str] = {}
    for module in modules:
        example = getattr(module, "EXAMPLE", None)
        if not isinstance(example, Example):
            raise ValueError(
                f"{module.__file__} has no EXAMPLE = Example(...), by which an example registers"
            )
        names = {kind: getattr(example, kind) for kind in ("presets", "text_models", "data", "features")}
        names["routers"] = [file.stem for file in _router_files(example)]
        for key in ((kind, name) for kind, found in names.items() for name in found):
            if key in taken:
                raise ValueError(
                    f"{key[1]!r} of {key[0]} is in {taken[key]} and {module.__name__}; rename one"
                )
            taken[key] = module.__name__
    return tuple(module.EXAMPLE for module in modules)


def _router_files(example: Example) -> list[Path]:
    return sorted(example.routers.glob("*.safetensors")) if example.routers else []


def presets() -> dict[str, Preset]:
    return {name: preset for example in examples() for name, preset in example.presets.items()}


def text_models() -> dict[str, TextModel]:
    return {name: model for example in examples() for name, model in example.text_models.items()}


def data() -> dict[str, Callable]:
    return {name: _calling(place) for example in examples() for name, place in example.data.items()}


def features() -> dict[str, Callable]:
    return {name: _calling(place) for example in examples() for name, place in example.features.items()}


def judge(model: str):
    """The judge of an example's model."""
    return next(_calling(one.judges[model])() for one in examples() if model in one.judges)


def router_file(name: str) -> Path | None:
    """The file of a router that ships with an example, by its name without a suffix."""
    files = [file for example in examples() for file in _router_files(example)]
    return next((file for file in files if file.stem == name), None)


def router_names() -> list[str]:
    """The names of all routers that ship with the examples."""
    return sorted(file.stem for example in examples() for file in _router_files(example))


def _calling(place: str) -> Callable:
    """The function that "module:function" names, imported at its first call."""
    module, _, name = place.partition(":")
    return lambda: getattr(importlib.import_module(module), name)()
