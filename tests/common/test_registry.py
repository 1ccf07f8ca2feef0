"""Examples register themselves: what they bring is found by name, and imported when it is asked for."""

import sys

import pytest

from common import registry
from common.registry import Example, Preset, TextModel


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package with one example, beside those of the project."""
    package = tmp_path / "some_examples"
    (package / "stars").mkdir(parents=True)
    (package / "stars" / "routers").mkdir()
    (package / "stars" / "routers" / "stars-T5.safetensors").touch()
    (package / "__init__.py").touch()
    (package / "stars" / "__init__.py").write_text(
        "from pathlib import Path\n"
        "from common.registry import Example, Preset, TextModel\n"
        "PRESET = Preset({'depth': 1}, Path('w.safetensors'), in_pixels=True)\n"
        "EXAMPLE = Example({'DiT-stars/2': PRESET}, {'stars': 'some_examples.stars.data:load'},\n"
        "                  {'stars': 'some_examples.stars.data:judge'}, Path(__file__).parent / 'routers',\n"
        "                  text_models={'PixArt-stars': TextModel(Path('w'), 4, Path('c'), 'a:b', '', '')})\n"
    )
    (package / "stars" / "data.py").write_text("def load(): return 'data'\ndef judge(): return 'judge'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "PACKAGE", "some_examples")
    registry.examples.cache_clear()
    yield package
    registry.examples.cache_clear()
    for name in [name for name in sys.modules if name.startswith("some_examples")]:
        del sys.modules[name]


@pytest.mark.usefixtures("folder")
def test_an_example_is_found_without_its_code():
    assert set(registry.presets()) == {"DiT-stars/2"}
    assert registry.presets()["DiT-stars/2"].in_pixels
    data, features = registry.data(), registry.features()
    assert "some_examples.stars.data" not in sys.modules
    assert data["stars"]() == "data"
    assert features["stars"]() == "judge"


def test_a_text_model_is_there_with_config_and_weights(tmp_path):
    model = TextModel(tmp_path, 4, tmp_path / "c", "common.registry:router_names", "train it", "install it")
    assert not model.is_there
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").touch()
    assert not model.is_there
    (tmp_path / "transformer" / "x.safetensors").touch()
    assert model.is_there
    assert model.find_encoder() == registry.router_names()


def test_its_routers_are_found_by_name(folder):
    assert registry.router_names() == ["stars-T5"]
    assert registry.router_file("stars-T5") == folder / "stars" / "routers" / "stars-T5.safetensors"
    assert registry.router_file("stars-T6") is None


def test_an_example_may_bring_a_part_only():
    example = Example({"DiT-x/2": Preset({}, None)})
    assert not example.data
    assert example.routers is None


def test_the_projects_own_examples():
    assert registry.router_names()
    assert all(preset.weights.is_file() for preset in registry.presets().values())
    assert set(registry.data()) == set(registry.features())


def test_example_without_a_record_is_named(folder):
    (folder / "moons").mkdir()
    (folder / "moons" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"moons/__init__\.py has no EXAMPLE = Example"):
        registry.presets()


@pytest.mark.parametrize("kind", ["presets", "text_models", "data", "features", "routers"])
def test_name_that_two_examples_use_is_refused(folder, kind):
    """Or one of them would be taken in silence."""
    (folder / "twin" / "routers").mkdir(parents=True)
    text = (folder / "stars" / "__init__.py").read_text()
    others = {"presets": "'DiT-stars/2'", "data": "{'stars': 'some_examples.stars.data:load'}"}
    others |= {"text_models": "{'PixArt-stars'"}
    others |= {"features": "{'stars': 'some_examples.stars.data:judge'}", "routers": None}
    for name, word in others.items():
        if name != kind and word:
            text = text.replace(word, word.replace("'stars'", "'twin'").replace("-stars", "-twin"))
    (folder / "twin" / "__init__.py").write_text(text)
    router = "stars-T5" if kind == "routers" else "twin-T5"
    (folder / "twin" / "routers" / f"{router}.safetensors").touch()
    with pytest.raises(
        ValueError, match=f"of {kind} is in some_examples.stars and some_examples.twin; rename"
    ):
        registry.examples()
