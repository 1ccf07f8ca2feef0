"""evaluate.py on files: digits against digits, statistics, pairs, Inception and LPIPS with seeded weights."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image

from common.images import Images
from examples.digits.classifier import load_classifier
from examples.digits.data import digit_images
from metrics.features import load_extractor
from metrics.frechet import feature_statistics, frechet_distance

EVALUATE = ["evaluate.py", "--device", "cpu"]


def as_images(x: torch.Tensor) -> np.ndarray:
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a.npz and b.npz: two parts of the digits; noisy.npz: a with noise."""
    folder = tmp_path_factory.mktemp("files")
    images = as_images(digit_images()[0])
    np.savez(folder / "a.npz", arr_0=images[:700])
    np.savez_compressed(folder / "b.npz", arr_0=images[700:])
    noise = np.random.default_rng(0).integers(-20, 21, images[:700].shape)
    np.savez(folder / "noisy.npz", arr_0=(images[:700] + noise).clip(0, 255).astype(np.uint8))
    return folder


def last_json(text: str) -> dict:
    """The command's last line; `run` puts warnings, such as a library's on its import, after it."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def evaluated(*arguments) -> dict:
    return last_json(run(*EVALUATE, *arguments))


def test_digits_against_digits(files, tmp_path):
    result = evaluated(
        files / "a.npz", "--reference", files / "b.npz", "--features", "digits", "--batch-size", 33,
        "--output", tmp_path / "x.json",
    )  # fmt: skip
    classifier, images = load_classifier(), digit_images()[0]
    quantized = torch.from_numpy(as_images(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    features = classifier.features(quantized).numpy()
    expected = frechet_distance(*feature_statistics(features[:700]), *feature_statistics(features[700:]))
    assert result["fid"] == pytest.approx(expected, rel=1e-6)
    assert 7 < result["inception_score"] < 10
    assert 0.5 < result["precision"] <= 1
    assert 0.5 < result["recall"] <= 1
    assert "sfid" not in result
    assert json.loads((tmp_path / "x.json").read_text()) == result


def test_statistics_take_the_place_of_images(files, tmp_path):
    statistics = tmp_path / "statistics.npz"
    digits = ["--features", "digits"]
    run(*EVALUATE, files / "b.npz", "--save-statistics", statistics, *digits)
    with np.load(statistics) as file:
        assert set(file.files) == {"mu", "sigma"}
    text = run(*EVALUATE, files / "a.npz", "--reference", statistics, *digits)
    result = last_json(text)
    assert result["fid"] == pytest.approx(
        evaluated(files / "a.npz", "--reference", files / "b.npz", *digits)["fid"], rel=1e-9
    )
    assert "holds no images, precision and recall are left out" in text
    assert "precision" not in result


def test_pairs(files):
    result = evaluated(files / "noisy.npz", "--paired", files / "a.npz", "--batch-size", 123)
    with np.load(files / "noisy.npz") as one, np.load(files / "a.npz") as other:
        error = np.mean((one["arr_0"].astype(float) - other["arr_0"]) ** 2)
    assert result["mse"] == pytest.approx(error / 127.5**2, rel=1e-9)
    assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-9)
    assert 0.8 < result["ssim"] < 1
    same = evaluated(files / "a.npz", "--paired", files / "a.npz")
    assert (same["mse"], same["psnr"], same["ssim"]) == (0, None, pytest.approx(1))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Seeded weights in the layout of torch-fidelity's file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Seeded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args, **_kwargs):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Seeded("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def colour_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (12, 32, 32, 3)).astype(np.uint8))
    return folder


@pytest.mark.slow
def test_inception_in_the_adm_protocol(colour_files, inception_weights, tmp_path):
    """On seeded weights: every figure, and statistics as ADM's reference batches hold them."""
    weights = ["--inception-weights", inception_weights]
    run(*EVALUATE, colour_files / "b.npz", "--save-statistics", tmp_path / "s.npz", *weights)
    with np.load(tmp_path / "s.npz") as file:
        shapes = {name: file[name].shape for name in file.files}
    assert shapes == {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
    result = evaluated(colour_files / "a.npz", "--reference", tmp_path / "s.npz", *weights)
    assert {"fid", "sfid", "inception_score"} <= result.keys()
    assert result["fid"] > 0
    assert result["sfid"] > 0


@pytest.mark.slow
def test_spatial_features_are_the_first_channels_of_mixed_6(inception_weights):
    """Up to the block named mixed_6 by hand (mixed is 5b, ... mixed_6 is 6d); channels last."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    extractor = load_extractor("inception", str(inception_weights))
    images = torch.randint(256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features, network = extractor(images), extractor._network
    x = interpolate_bilinear_2d_like_tensorflow1x(
        images.permute(0, 3, 1, 2).float(), (299, 299), align_corners=False
    )
    x = (x - 128) / 128
    for name, module in network.named_children():
        if name == "Mixed_6d":
            break
        x = module(x)
    conv = network.Mixed_6d.branch1x1(x)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    assert features.spatial[1, 7 * (17 * 4 + 9) + 3] == conv[1, 3, 4, 9]
    assert features.probabilities.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.slow
def test_inception_reads_grey_images_as_colour_and_refuses_nan_weights(
    colour_files, inception_weights, tmp_path
):
    extractor = load_extractor("inception", str(inception_weights))
    grey = torch.randint(256, (2, 32, 32, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for one, other in zip(extractor(grey), extractor(grey.expand(-1, -1, -1, 3)), strict=True):
        assert torch.equal(one, other)
    state = torch.load(inception_weights)
    state["Mixed_5b.branch1x1.conv.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    weights = ["--inception-weights", tmp_path / "nan.pth"]
    line = error_line(*EVALUATE, colour_files / "a.npz", "--save-statistics", tmp_path / "s.npz", *weights)
    assert "nan.pth: Mixed_5b.branch1x1.conv.weight holds NaN or infinity" in line


@pytest.mark.slow
def test_lpips_with_local_weights(colour_files, tmp_path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    weights = ["--lpips-weights", tmp_path / "alexnet.pth"]
    different = evaluated(colour_files / "a.npz", "--paired", colour_files / "b.npz", *weights)
    same = evaluated(colour_files / "a.npz", "--paired", colour_files / "a.npz", *weights)
    assert same["lpips"] == pytest.approx(0, abs=1e-6)
    assert different["lpips"] > 1e-4
    state = torch.load(tmp_path / "alexnet.pth")
    state["features.0.bias"][3] = torch.inf
    torch.save(state, tmp_path / "alexnet.pth")
    line = error_line(*EVALUATE, colour_files / "a.npz", "--paired", colour_files / "b.npz", *weights)
    assert "alexnet.pth: features.0.bias holds NaN or infinity" in line


def test_pairs_of_other_noise_are_refused(files, tmp_path):
    for name, seed in (("one", 1), ("other", 2)):
        (tmp_path / f"{name}.npz").write_bytes((files / "a.npz").read_bytes())
        (tmp_path / f"{name}.npz.settings.json").write_text(json.dumps({"seed": seed, "labels": "random"}))
    line = error_line(*EVALUATE, tmp_path / "one.npz", "--paired", tmp_path / "other.npz")
    assert "drawn with seed 1" in line
    assert "with 2; pairs need the same noise" in line


def test_images_are_read_in_batches(tmp_path):
    """A file of 550 MB, one batch at a time: the peak of memory stays far below it."""
    shape = (20_000, 96, 96, 3)
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as stream,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for first in range(0, 20_000, 1000):
            stream.write(bytes([first // 1000]) * (1000 * 96 * 96 * 3))
    tracemalloc.start()
    images = Images(tmp_path / "x.npz")
    assert len(images) == 20_000
    means = [batch.float().mean().item() for batch in images.batches(500)]
    assert means == [i // 2 for i in range(40)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def save_statistics(path, mean, covariance, names=("mu", "sigma")):
    np.savez(path, **dict(zip(names, (mean, covariance), strict=True)))


@pytest.fixture(scope="module")
def statistics(files):
    """(mean, covariance) of a digits file's features."""
    path = files / "statistics.npz"
    run(*EVALUATE, files / "b.npz", "--save-statistics", path, "--features", "digits")
    with np.load(path) as file:
        return file["mu"], file["sigma"]


def spoilt(array: np.ndarray, *values: tuple) -> np.ndarray:
    array = array.copy()
    for index, value in values:
        array[index] = value
    return array


def test_statistics_are_checked_before_the_pass(files, statistics, tmp_path, monkeypatch):
    """A NaN in them would give FID 0: `max(0.0, nan)`."""
    monkeypatch.setattr("evaluate.summarize", lambda *_: pytest.fail("the pass began"))
    mean, covariance = statistics
    for name, (mu, sigma, words) in {
        "nan mean": (spoilt(mean, (5, np.nan)), covariance, "mu holds 1 of 64 values that are not finite"),
        "infinite": (mean, spoilt(covariance, ((3, 3), np.inf)), "sigma holds 1 of 4096 values"),
        "of one image": (mean, np.full((64, 64), np.nan), "sigma holds 4096 of 4096 values"),
        "halves": (mean, np.triu(covariance), "sigma is not symmetric"),
        "negative": (mean, -covariance, "sigma is no covariance: its eigenvalues reach from"),
        "indefinite": (mean, spoilt(covariance, ((0, 0), -5)), "sigma is no covariance"),
        "square": (mean[None], covariance, "mu and sigma of shapes (1, 64) and (64, 64) do not fit"),
        "variances": (mean, np.diag(covariance), "mu and sigma of shapes (64,) and (64,) do not fit"),
        "swapped": (covariance, mean, "do not fit"),
        "complex": (mean, covariance + 0j, "sigma is complex128 (64, 64); real numbers are needed"),
        "text": (mean.astype(str), covariance, "real numbers are needed"),
        "objects": (mean, covariance.astype(object), "real numbers are needed"),
    }.items():
        path = tmp_path / f"{name}.npz"
        save_statistics(path, mu, sigma)
        line = error_line(*EVALUATE, files / "a.npz", "--reference", path, "--features", "digits")
        assert words in line, name
        assert path.name in line
    for present, absent in (("mu", "sigma"), ("sigma_s", "mu_s")):
        np.savez(tmp_path / "half.npz", **{present: mean})
        line = error_line(*EVALUATE, files / "a.npz", "--reference", tmp_path / "half.npz")
        assert f"half.npz holds {present} without" in line
        assert absent in line
    save_statistics(tmp_path / "spatial.npz", mean, covariance, ("mu_s", "sigma_s"))
    digits = ["--features", "digits"]
    line = error_line(*EVALUATE, files / "a.npz", "--reference", tmp_path / "spatial.npz", *digits)
    assert "spatial.npz holds no mu and sigma, which --features digits needs" in line


def test_statistics_of_other_types_give_the_same_distance(files, statistics, tmp_path):
    digits = ["--features", "digits"]
    expected = evaluated(files / "a.npz", "--reference", files / "statistics.npz", *digits)["fid"]
    for change in (lambda x: x.astype(">f8"), lambda x: x.astype(np.float32), np.asfortranarray):
        save_statistics(tmp_path / "s.npz", *map(change, statistics))
        found = evaluated(files / "a.npz", "--reference", tmp_path / "s.npz", *digits)["fid"]
        assert found == pytest.approx(expected, rel=1e-4)


class Broken:
    """Digits features that turn NaN at image 300, or from the first on."""

    def __init__(self, first: int):
        self.plain, self.first, self.seen = load_extractor("digits"), first, 0

    def __call__(self, images):
        features = self.plain(images)
        if len(images) > 2:  # not the look at the first two
            self.seen += len(images)
        if self.seen > self.first:
            features.pool[self.first - (self.seen - len(images)), 7] = torch.nan
        return features


@pytest.mark.parametrize("first", [0, 300])
def test_features_that_are_not_finite_are_named_and_nothing_is_written(files, tmp_path, monkeypatch, first):
    monkeypatch.setattr("evaluate.load_extractor", lambda *_: Broken(first))
    outputs = ["--output", tmp_path / "x.json", "--save-statistics", tmp_path / "s.npz"]
    line = error_line(*EVALUATE, files / "a.npz", "--reference", files / "b.npz", *outputs)
    assert f"a.npz: pool features hold NaN or infinity, the first in number {first}" in line
    assert not list(tmp_path.iterdir())


def test_too_few_images_are_refused_before_the_pass(files, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.summarize", lambda *_: pytest.fail("the pass began"))
    images = as_images(digit_images()[0])
    for n in (1, 3):
        np.savez(tmp_path / f"{n}.npz", arr_0=images[:n])
    digits = ["--features", "digits"]
    one, three, a = tmp_path / "1.npz", tmp_path / "3.npz", files / "a.npz"
    line = error_line(*EVALUATE, one, "--save-statistics", tmp_path / "s.npz", *digits)
    assert "1.npz holds one image, which has no covariance" in line
    assert "holds one image" in error_line(*EVALUATE, one, "--reference", a, *digits)
    for few in (one, three):
        line = error_line(*EVALUATE, a, "--reference", few, *digits)
        assert f"{few.name} holds" in line
        assert "precision and recall need more than 3" in line
    assert "3.npz holds too few images (3)" in error_line(*EVALUATE, three, "--reference", a, *digits)


@pytest.mark.usefixtures("statistics")
def test_few_images_have_an_inception_score(files, tmp_path):
    """Nine, in one part; a set of 5,001 ends in a part of one image, as ADM's does, and is told of it."""
    images = as_images(digit_images()[0])
    reference = ["--reference", files / "statistics.npz", "--features", "digits"]
    np.savez(tmp_path / "x.npz", arr_0=images[:9])
    result = evaluated(tmp_path / "x.npz", *reference)
    assert 1 < result["inception_score"] < 9
    assert result["inception_score_std"] is None
    np.savez(tmp_path / "x.npz", arr_0=np.resize(images, (5001, *images.shape[1:])))
    text = run(*EVALUATE, tmp_path / "x.npz", *reference, "--batch-size", 1000)
    assert "note: IS: the last part holds 1 images and counts like those of 5000" in text
    result = last_json(text)
    one, std = result["inception_score"], result["inception_score_std"]
    assert (one + std, one - std) == (pytest.approx(2 * one - 1), pytest.approx(1))


def write_pictures(folder, images, suffix=".png"):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{number}{suffix}")
    return folder


def test_folders_of_pictures_take_the_place_of_files(tmp_path):
    images = as_images(digit_images()[0])
    samples = write_pictures(tmp_path / "samples", images[:40])
    reference = write_pictures(tmp_path / "reference", images[700:760], ".bmp")
    np.savez(tmp_path / "samples.npz", arr_0=images[:40])
    np.savez(tmp_path / "reference.npz", arr_0=images[700:760])
    digits = ["--features", "digits"]
    expected = evaluated(tmp_path / "samples.npz", "--reference", tmp_path / "reference.npz", *digits)
    found = evaluated(samples, "--reference", reference, *digits, "--batch-size", 7)
    figures = ("n", "fid", "inception_score", "precision", "recall")
    assert [found[name] for name in figures] == pytest.approx([expected[name] for name in figures], rel=1e-6)
    same = evaluated(samples, "--paired", tmp_path / "samples.npz")  # in the order of the numbers
    assert (same["mse"], same["psnr"]) == (0, None)


def test_pictures_of_other_names_are_no_pairs(tmp_path):
    images = as_images(digit_images()[0])[:3]
    one, other = (write_pictures(tmp_path / name, images) for name in ("one", "other"))
    assert evaluated(one, "--paired", other)["mse"] == 0
    (other / "1.png").rename(other / "7.png")
    line = error_line(*EVALUATE, one, "--paired", other)
    assert "one holds 1 where" in line
    assert "pairs need the same names" in line


def test_folders_that_are_no_samples_are_refused_before_the_pass(files, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.summarize", lambda *_: pytest.fail("the pass began"))
    images = as_images(digit_images()[0])[:5]
    digits = ["--reference", files / "b.npz", "--features", "digits"]
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures" in error_line(*EVALUATE, tmp_path / "empty", *digits)
    assert "empty holds no pictures" in error_line(*EVALUATE, files / "a.npz", "--paired", tmp_path / "empty")
    folder = write_pictures(tmp_path / "pictures", images)
    (folder / "3.png").write_bytes(b"")
    assert "3.png is no picture of a known format" in error_line(*EVALUATE, folder, *digits)
    Image.fromarray(images[3].repeat(2, axis=0)[..., 0]).save(folder / "3.png")
    assert "3.png is 8 x 16" in error_line(*EVALUATE, folder, *digits)
    Image.new("RGB", (8, 8)).save(folder / "3.png")
    line = error_line(*EVALUATE, folder, *digits)
    assert "--features digits reads 8 x 8 grey images, not (8, 8, 3)" in line


def test_picture_that_is_cut_ends_the_pass_with_its_name(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.effect_noise((8, 8), 50 + number).resize((64, 64)).save(folder / f"{number}.png")
    cut = folder / "4.png"
    cut.write_bytes(cut.read_bytes()[:300])
    line = error_line(*EVALUATE, folder, "--paired", folder, "--output", tmp_path / "x.json")
    assert "4.png cannot be read as a picture" in line
    assert not (tmp_path / "x.json").exists()


def test_damaged_settings_are_named(files, tmp_path):
    for name in ("one", "other"):
        (tmp_path / f"{name}.npz").write_bytes((files / "a.npz").read_bytes())
        (tmp_path / f"{name}.npz.settings.json").write_text("")
    line = error_line(*EVALUATE, tmp_path / "one.npz", "--paired", tmp_path / "other.npz")
    assert "one.npz.settings.json is damaged" in line


def test_wrong_use_is_one_line(files, tmp_path):
    a = files / "a.npz"
    assert "nothing to do" in run(*EVALUATE, a, status=2)
    digits = ["--features", "digits"]
    assert "nowhere.npz does not exist" in error_line(*EVALUATE, a, "--reference", "nowhere.npz", *digits)
    line = error_line(*EVALUATE, a, "--reference", a)
    assert "--features inception needs its weights; give --inception-weights" in line
    line = error_line(*EVALUATE, a, "--reference", a, "--inception-weights", "nowhere.pth")
    assert "nowhere.pth does not exist" in line
    assert "--features magic is unknown" in error_line(*EVALUATE, a, "--reference", a, "--features", "magic")
    assert "pairs are needed" in error_line(*EVALUATE, a, "--paired", files / "b.npz")
    text = run(*EVALUATE, a, "--reference", a, *digits, "--lpips-weights", "w.pth")
    assert "--lpips-weights has no effect without --paired" in text
    assert "is not of .json" in error_line(*EVALUATE, a, "--paired", a, "--output", tmp_path / "x.txt")
    line = error_line(*EVALUATE, a, "--paired", a, "--lpips-weights", "nowhere.pth")
    assert "--lpips-weights nowhere.pth does not exist" in line
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    line = error_line(*EVALUATE, a, "--reference", tmp_path / "other.npz", *digits)
    assert "mu has 3 values" in line
    np.savez(tmp_path / "flat.npz", mu=np.zeros(64), sigma=np.zeros(64))
    line = error_line(*EVALUATE, a, "--reference", tmp_path / "flat.npz", *digits)
    assert "mu and sigma of shapes (64,) and (64,) do not fit" in line
    for name, source in (("cut.npz", files / "b.npz"), ("cut_statistics.npz", tmp_path / "flat.npz")):
        content = bytearray(source.read_bytes())
        content[50:70] = bytes(20)
        (tmp_path / name).write_bytes(content)
        assert "damaged" in error_line(*EVALUATE, a, "--reference", tmp_path / name, *digits)
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    line = error_line(*EVALUATE, tmp_path / "none.npz", "--paired", a)
    assert "holds x, no images (arr_0)" in line
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    assert "is no .npz" in error_line(*EVALUATE, tmp_path / "broken.npz", "--paired", a)
    (tmp_path / "bad.pth").write_bytes(b"not a torch file")
    line = error_line(*EVALUATE, a, "--reference", a, "--inception-weights", tmp_path / "bad.pth")
    assert "bad.pth" in line
