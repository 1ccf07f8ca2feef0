"""Training Learning-to-Cache: its data, what it trains, groups, processes and resuming, wrong use."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from commands import error_line, run, write_old_settings
from PIL import Image
from ranks import on_two_ranks, run_on_ranks
from safetensors.torch import load_file
from torch import nn

from backbones.loading import build_model
from benchmarks.l2c_reach import PUBLISHED, reach
from common import distributed
from diffusion import create_diffusion
from objectives import update_rows
from router import Router, find_router, load_router
from training.arguments import parse_args
from training.data import center_crop, numbered_batches, open_data, to_model_space
from training.rounds import Pairs, draw_steps, full_steps
from training.settings import TrainSettings

TRAIN = [
    "train_router.py",
    "--model",
    "DiT-digits/2",
    "--method",
    "l2c",
    "--data",
    "digits",
    "--device",
    "cpu",
]
TRAIN += ["--num-sampling-steps", 6, "--global-batch-size", 4, "--lr", 0.05, "--l1", 1e-3, "--log-every", 5]


def trained(results):
    return load_router(find_router(next(results.glob("0*"))))


STEPS = 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run(*TRAIN, "--results-dir", results, "--max-steps", STEPS)
    return trained(results)


def test_even_rows_are_trained_and_odd_ones_compute(uninterrupted):
    initial = torch.randn(5, 24, generator=torch.Generator().manual_seed(42))
    assert not any(torch.equal(uninterrupted.rows[row], initial[row]) for row in (0, 2, 4))
    assert torch.isinf(uninterrupted.logits[1::2]).all()
    assert torch.isfinite(uninterrupted.logits[::2]).all()
    schedule = uninterrupted.schedule(0.9)
    assert schedule.compute[1::2].all()
    assert schedule.cur > 0.3
    assert uninterrupted.info["method"] == "l2c"
    assert uninterrupted.info["cfg_scale"] == 1.0


def test_every_row_trains_all_but_the_first(tmp_path):
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 8, "--every-row")
    router = trained(tmp_path)
    assert torch.isfinite(router.logits).all()
    initial = torch.randn(5, 24, generator=torch.Generator().manual_seed(42))
    assert not any(torch.equal(router.rows[row], initial[row]) for row in range(5))
    assert router.info["method"] == "l2c-every-row"


def test_resumed_run_is_the_same(uninterrupted, tmp_path):
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 4)
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", STEPS, "--resume", "auto")
    assert torch.equal(trained(tmp_path).logits, uninterrupted.logits)


def metrics(results) -> list[dict]:
    lines = next(results.glob("0*/metrics.jsonl")).read_text().splitlines()
    return [json.loads(line) | {"steps_per_second": 0} for line in lines]


@pytest.mark.slow
def test_four_processes_train_the_same_bits(tmp_path):
    """With a target: beta and the end of the run are decided by what all groups did."""
    arguments = [*TRAIN, "--max-steps", 8, "--target-cur", 0.3, "--log-every", 4]
    run(*arguments, "--results-dir", tmp_path / "one")
    run_on_ranks(4, *arguments, "--results-dir", tmp_path / "several")
    one, several = (load_file(find_router(next((tmp_path / n).glob("0*")))) for n in ("one", "several"))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "several")


def test_a_step_updates_the_rows_that_its_groups_drew(uninterrupted):
    """Steps of 4 groups: Adam has counted for each row the steps in which a group drew it."""
    drawn = Counter()
    for number in range(STEPS):
        drawn.update({step - 1 for step in draw_steps(42, number, full_steps(6), 4)})
    steps = load_file(uninterrupted.info["path"])["resume.step"]
    assert steps.tolist() == [drawn[row] for row in range(5)]
    assert sum(drawn.values()) > 2 * STEPS  # one group would have updated a row a step


@pytest.mark.parametrize("every_row", [False, True])
def test_groups_draw_steps_of_their_own(every_row):
    """The first group's do not depend on how many groups there are; all steps come equally often."""
    steps, counts = full_steps(10, every_row), Counter()
    assert list(steps) == (list(range(1, 10)) if every_row else [1, 3, 5, 7, 9])
    for number in range(400):
        drawn = draw_steps(3, number, steps, 8)
        assert drawn[:1] == draw_steps(3, number, steps, 1)
        counts.update(drawn)
    assert set(counts) == set(steps)
    assert min(counts.values()) > 0.75 * 3200 / len(steps)
    assert draw_steps(3, 7, steps, 8) != draw_steps(4, 7, steps, 8)


@pytest.mark.parametrize(("groups", "flags"), [(1, []), (8, []), (8, ["--every-row"])])
def test_rows_that_a_step_updates_are_counted_for_the_target(groups, flags):
    """What moves beta towards a target: the mean number of rows, exactly 1 for one group."""
    arguments = ["--model", "DiT-digits/2", "--method", "l2c", "--data", "digits", "--groups", str(groups)]
    args = parse_args([*arguments, "--num-sampling-steps", "20", "--global-batch-size", "8", *flags])
    settings, model = TrainSettings.from_arguments(args), build_model("DiT-digits/2")
    rounds = Pairs(settings, distributed.start("cpu"), model, create_diffusion("20"), None)
    drawn = [len(set(draw_steps(0, number, rounds.steps, groups))) for number in range(2000)]
    assert rounds.rows_per_step == pytest.approx(sum(drawn) / 2000, rel=0.02)
    assert (rounds.rows_per_step == 1) == (groups == 1)


class Rows(nn.Module):
    """The rows of a router, one of which is read in a forward."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.rows = nn.ParameterList(list(logits[:-1].clone()))

    def forward(self, row: int, weight: torch.Tensor) -> torch.Tensor:
        return (weight * torch.sigmoid(self.rows[row])).sum()


@pytest.mark.slow
def test_groups_are_what_ranks_are_under_ddp(tmp_path):
    """Against DistributedDataParallel with one group a rank: rows of one rank, of both, and of none."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    rows = torch.randint(5, (30, 2), generator=generator).tolist()
    rows += [[3, 3], [1, 4]]
    weights = torch.randn(len(rows), 2, 4, generator=generator)

    def train(processes: distributed.Processes) -> None:
        model = nn.parallel.DistributedDataParallel(Rows(logits), find_unused_parameters=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        for own, weight in zip(rows, weights, strict=True):
            optimizer.zero_grad()
            model(own[processes.rank], weight[processes.rank]).backward()
            optimizer.step()
        if processes.is_main:
            torch.save(torch.stack(list(model.module.rows)).detach(), tmp_path / "out.pt")

    on_two_ranks(train, tmp_path)
    router = Router.from_logits(logits)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
    for own, weight in zip(rows, weights, strict=True):
        scores = torch.sigmoid(torch.stack([router.rows[row].detach() for row in own]))
        update_rows(router, optimizer, own, weight * scores * (1 - scores))
    torch.testing.assert_close(router.logits[:-1], torch.load(tmp_path / "out.pt"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_published_cur_is_within_reach_of_eight_groups_alone():
    """T = 50 and the published settings; one row a step ends far below the published router's CUR."""
    alone, together = (100 * reach(50, groups)["cur"] for groups in (1, 8))
    assert alone == pytest.approx(3.2, abs=0.3)
    assert alone < PUBLISHED[50] < together


def test_a_run_from_before_groups_goes_on_with_one(tmp_path):
    """Its settings have no groups; with the default it begins anew, and says so."""
    arguments = [*TRAIN, "--results-dir", tmp_path, "--resume", "auto"]
    run(*arguments, "--max-steps", 4, "--groups", 1)
    write_old_settings(find_router(next(tmp_path.glob("0*"))))
    text = run(*arguments, "--max-steps", 6)
    assert re.search(r".*trained with --groups 1, not 4: a new run begins", text)
    shutil.rmtree(max(tmp_path.iterdir()))
    assert "resuming from" in run(*arguments, "--max-steps", 6, "--groups", 1)


@pytest.mark.parametrize(
    ("flags", "l1", "threshold"),
    [
        (["--num-sampling-steps", "10"], 1e-6, 0.1),
        (["--num-sampling-steps", "20"], 5e-6, 0.1),
        (["--num-sampling-steps", "ddim20", "--image-size", "256"], 5e-6, 0.1),
        (["--num-sampling-steps", "50"], 1e-6, 0.1),
        (["--num-sampling-steps", "50", "--image-size", "512"], 5e-6, 0.9),
        (["--num-sampling-steps", "20", "--image-size", "512"], 1e-6, 0.9),
        (["--num-sampling-steps", "25"], 1e-6, 0.1),
        (["--num-sampling-steps", "20", "--l1", "0.5", "--ste-threshold", "0.3"], 0.5, 0.3),
    ],
)
def test_defaults_follow_the_published_settings(flags, l1, threshold):
    args = parse_args(["--method", "l2c", "--data-path", "images", *flags])
    assert (args.l1, args.ste_threshold) == (l1, threshold)
    assert (args.groups, args.global_batch_size, args.data, args.lr) == (8, 64, "images", 1e-3)


def test_groups_that_do_not_share_the_batch_are_refused(tmp_path):
    base = [*TRAIN, "--results-dir", tmp_path]
    assert "--global-batch-size 4 is no multiple of --groups 3" in error_line(*base, "--groups", 3)
    assert "0 is not at least 1" in error_line(*base, "--groups", 0)
    text = run(*base, "--max-steps", 1, "--global-batch-size", 6)
    assert "warning: 8 groups do not share --global-batch-size 6: 2 do" in text


@pytest.mark.parametrize(("ranks", "flags", "words"), [
    (3, ["--global-batch-size", 24], "--groups 8 cannot be shared by 3 ranks, take a multiple of 3"),
    (16, ["--global-batch-size", 64], "--groups 8 cannot be shared by 16 ranks, take a multiple of 16"),
    (3, ["--global-batch-size", 8], "size 8 cannot be shared by 3 ranks, take a multiple of 3"),
])  # fmt: skip
def test_groups_that_ranks_cannot_share_are_refused(tmp_path, monkeypatch, ranks, flags, words):
    processes = distributed.Processes(0, ranks, torch.device("cpu"))
    monkeypatch.setattr("common.distributed.start", lambda _: processes)
    assert words in error_line(*TRAIN, *flags, "--results-dir", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_batches_cover_an_epoch_once_whoever_draws_them():
    data = open_data("digits", build_model("DiT-digits/2"))
    n, size = len(data), 600

    def drawn(world_size: int, first: int = 0) -> list[torch.Tensor]:
        streams = [numbered_batches(data, 3, first, size, rank, world_size, 0) for rank in range(world_size)]
        return [torch.cat([next(stream)[0] for stream in streams]) for _ in range(3 - first)]

    one = drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(one, drawn(2), strict=True))
    assert torch.equal(one[1], drawn(1, first=1)[0])
    epoch = torch.cat(one)[:n].flatten(1)
    everything = torch.stack([data[i][0] for i in range(n)]).flatten(1)
    assert torch.equal(epoch.sum(0), everything.sum(0))  # the same images in another order
    assert not torch.equal(epoch, everything)


def test_crop_is_the_middle_square():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 255
    assert np.asarray(center_crop(Image.fromarray(pixels), 16)).min() > 200
    assert center_crop(Image.fromarray(pixels), 16).size == (16, 16)


class FakeVae:
    """Encodes to the mean of 8 x 8 patches in four equal channels, without spread."""

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8).mean(1, keepdim=True).repeat(1, 4, 1, 1)
        posterior = type("Posterior", (), {"mean": mean, "std": torch.zeros_like(mean)})
        return type("Encoded", (), {"latent_dist": posterior})


def test_images_are_flipped_by_their_generator_encoded_and_scaled():
    x = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    x[..., 8:] = 255
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    latents = to_model_space(x, FakeVae(), generators)
    assert latents.shape == (20, 4, 2, 2)
    torch.testing.assert_close(latents.abs(), torch.full_like(latents, 0.18215))
    flipped = int((latents[:, 0, 0, 0] > 0).sum())
    assert 4 < flipped < 16


@pytest.fixture
def image_folder(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((70, 50), 50 + number).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.slow
@pytest.mark.usefixtures("small_dit")
def test_image_folder_through_a_vae(image_folder, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=down,
        up_block_types=up,
    )
    vae.save_pretrained(tmp_path / "vae")
    arguments = ["--model", "DiT-S/8", "--random-weights", "--image-size", 64, "--num-classes", 2]
    arguments += ["--data", image_folder, "--vae", tmp_path / "vae", "--num-works", 1, "--max-steps", 3]
    run(*TRAIN, *arguments, "--results-dir", tmp_path / "results")
    assert trained(tmp_path / "results").info["train_steps"] == 3


def test_latents_from_a_file(tmp_path):
    np.savez(tmp_path / "x.npz", latents=np.zeros((5, 1, 8, 8), np.float32), labels=np.arange(5))
    run(*TRAIN, "--data", tmp_path / "x.npz", "--results-dir", tmp_path / "results", "--max-steps", 2)
    np.savez(tmp_path / "y.npz", latents=np.zeros((5, 4, 8, 8), np.float32), labels=np.arange(5))
    line = error_line(*TRAIN, "--data", tmp_path / "y.npz", "--results-dir", tmp_path / "no")
    assert "holds samples of shape (4, 8, 8), the model denoises (1, 8, 8)" in line
    np.savez(tmp_path / "l.npz", latents=np.zeros((5, 1, 8, 8), np.float32), labels=np.arange(6, 11))
    line = error_line(*TRAIN, "--data", tmp_path / "l.npz", "--results-dir", tmp_path / "no")
    assert "5 latents and 5 labels; as many are needed, the labels within 0 .. 9" in line
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:700])
    line = error_line(*TRAIN, "--data", tmp_path / "cut.npz", "--results-dir", tmp_path / "no")
    assert "cannot be read" in line
    np.savez(tmp_path / "z.npz", x=np.zeros(3))
    line = error_line(*TRAIN, "--data", tmp_path / "z.npz", "--results-dir", tmp_path / "no")
    assert "holds x; `latents` and `labels` are needed" in line
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("small_dit")
def test_wrong_use(tmp_path, image_folder):
    no_data = [part for part in TRAIN if part not in ("--data", "digits")]
    assert "--method l2c needs --data" in run(*no_data, status=2)
    assert "does not exist; give an image folder" in error_line(*TRAIN, "--data", "nowhere")
    assert "use digits" in error_line(*TRAIN, "--data", image_folder)
    latent = ["--model", "DiT-S/8", "--random-weights", "--image-size", 64, "--num-classes", 3]
    line = error_line(*TRAIN, *latent, "--data", image_folder, "--results-dir", tmp_path / "no")
    assert "has 2 folders, the model 3 classes" in line
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    assert "cannot be read" in error_line(*TRAIN, "--data", tmp_path / "x.npz")
    assert "0 is not above 0" in run(*TRAIN, "--lr", 0, status=2)
    text = run(*TRAIN, "--results-dir", tmp_path / "r", "--max-steps", 1, "--proxy", "paper")
    assert "warning: --proxy has no effect with --method l2c" in text
