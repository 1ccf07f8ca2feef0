"""evaluate.py on files: digits against digits, statistics, pairs, Inception and LPIPS with seeded weights."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from commands import error_line, run

from digits.classifier import load_classifier
from digits.data import digit_images
from evaluate import Images
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
def test_lpips_with_local_weights(colour_files, tmp_path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    weights = ["--lpips-weights", tmp_path / "alexnet.pth"]
    different = evaluated(colour_files / "a.npz", "--paired", colour_files / "b.npz", *weights)
    same = evaluated(colour_files / "a.npz", "--paired", colour_files / "a.npz", *weights)
    assert same["lpips"] == pytest.approx(0, abs=1e-6)
    assert different["lpips"] > 1e-4


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
