"""A run: what it counts, when it writes and ends, what its checkpoints hold, and what it refuses."""

import json

import pytest
import torch
from ranks import on_two_ranks
from safetensors.torch import load_file

from diffusion import create_diffusion
from router import load_router
from training.checkpoints import read_checkpoint, runs
from training.run import Run, check_shared, choose_target
from training.settings import EndToEndSettings, HarmonicaSettings, L2CSettings, TrainSettings


def harmonica(max_steps: int, **others) -> HarmonicaSettings:
    return HarmonicaSettings(max_steps=max_steps, lambda_c=7, lr=0.05, l1=1e-3, **others)


def checkpoints(folder) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "checkpoints").glob("*.safetensors"))


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_log_lines_and_checkpoints_come_when_they_are_due(train_tiny):
    """4 train steps a trajectory; the last checkpoint is that of the end."""
    said = []
    folder = train_tiny(harmonica(13), ckpt_every=6, show=said.append)
    assert folder.name == "000-DiT-tiny-T4-seed42"
    assert checkpoints(folder) == [6, 12, 13]
    assert [row["train_steps"] for row in metrics(folder)] == [5, 10]
    assert (folder / "log.txt").read_text().splitlines() == said
    assert said[0] == "weights: tiny"
    assert said[-1].startswith("finished 13 train steps")
    assert checkpoints(train_tiny(harmonica(12), "other", ckpt_every=6)) == [6, 12]


def test_a_checkpoint_holds_the_state_at_the_start_of_its_round(train_tiny):
    """A router of now, but the state of train step 4: the trajectory of steps 5 to 8 is repeated."""
    folder = train_tiny(harmonica(9), ckpt_every=1)
    files = {step: load_file(folder / "checkpoints" / f"{step:07d}.safetensors") for step in range(1, 10)}
    states = {step: int(file["resume.train_steps"]) for step, file in files.items()}
    assert states == {1: 0, 2: 0, 3: 0, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 9: 8}
    for step in (5, 6, 7):
        assert torch.equal(files[step]["resume.logits"], files[4]["logits"])
    assert torch.equal(files[8]["resume.logits"], files[8]["logits"])
    assert not torch.equal(files[7]["logits"], files[4]["logits"])


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_run_goes_on_in_the_same_bits(train_tiny, stop):
    """Stopped within a trajectory or between two."""
    whole = train_tiny(harmonica(10), "whole")
    train_tiny(harmonica(stop), "parts")
    resumed = train_tiny(harmonica(10), "parts", resume="auto")
    assert len(runs(resumed.parent)) == 1
    one, other = (load_file(folder / "checkpoints" / "0000010.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["train_steps"] for row in metrics(resumed)] == [5, 10]


@pytest.mark.parametrize("others", [{}, {"target_cur": 0.4}])
def test_two_ranks_train_the_same_router(train_tiny, tmp_path, others):
    one = train_tiny(harmonica(20), "one", global_batch_size=8, **others)

    def train(processes) -> None:
        folder = train_tiny(harmonica(20), "two", processes=processes, global_batch_size=8, **others)
        assert (folder is None) == (processes.rank > 0)

    on_two_ranks(train, tmp_path)
    routers = [load_router(one), load_router(next((tmp_path / "two").iterdir()))]
    assert routers[0].info["train_steps"] == routers[1].info["train_steps"]
    torch.testing.assert_close(routers[0].logits, routers[1].logits, rtol=1e-4, atol=1e-4)
    assert routers[0].info["settings"] == routers[1].info["settings"]
    rows = [metrics(folder) for folder in (one, next((tmp_path / "two").iterdir()))]
    for row, other in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert row["proxy_weights"] == pytest.approx(other["proxy_weights"], rel=1e-3)


def test_other_settings_begin_a_new_run(train_tiny):
    first = train_tiny(harmonica(4))
    assert train_tiny(harmonica(8), resume="auto") == first
    second = train_tiny(harmonica(8), resume="auto", global_seed=43)
    assert second != first
    assert second.name.startswith("001-")


def test_a_run_that_has_not_met_its_target_goes_on_for_a_quarter(train_tiny):
    said = []
    folder = train_tiny(harmonica(16), show=said.append, target_cur=0.7)
    assert checkpoints(folder)[-1] == 20
    assert any("the target was not met" in line for line in said)


def test_a_run_ends_as_soon_as_its_target_is_met(train_tiny, monkeypatch):
    """Not before its steps are done; nor is it asked before."""
    asked = []

    def met(self) -> bool:
        asked.append(self.train_steps)
        return self.train_steps >= 18

    monkeypatch.setattr("training.state.Training.target_met", property(met))
    folder = train_tiny(harmonica(16), target_cur=0.7)
    assert checkpoints(folder)[-1] == 18
    assert sorted(set(asked)) == [16, 17, 18]


def test_beta_is_moved_between_rounds_alone(train_tiny, monkeypatch):
    moved = []

    def note(self, total_steps: int) -> None:
        moved.append((self.train_steps, total_steps))

    monkeypatch.setattr("training.state.RowTraining.round_done", note)
    train_tiny(harmonica(10))
    assert moved == [(4, 10), (8, 10)]


def test_the_record_names_the_model(train_tiny, tiny_model):
    folder = train_tiny(harmonica(4))
    settings = load_router(folder).info["settings"]
    own = {"image_size", "num_classes", "null_label", "learn_sigma", "weights"}
    assert own <= settings.keys()
    assert settings["num_classes"] == tiny_model.num_classes
    assert settings["precision"] == "fp32"  # what is meant, not what was asked for
    path = folder / "checkpoints" / "0000004.safetensors"
    assert read_checkpoint(path, settings)["train_steps"] == 4


def test_facts_of_a_router_file(train_tiny, tiny_model):
    info = load_router(train_tiny(harmonica(8, proxy="paper"))).info
    schedule = load_router(info["path"]).schedule(0.1)
    assert (info["proxy"], info["method"], info["respacing"]) == ("paper", "harmonica", 4)
    assert (info["cfg_scale"], info["threshold"], info["reg_weight"]) == (1.5, 0.1, 1e-3)
    assert info["cur"] == pytest.approx(schedule.cur, abs=1e-6)
    assert info["speedup_macs"] == pytest.approx(schedule.speedup_macs(tiny_model), abs=1e-6)
    assert "proxy" not in load_router(train_tiny(EndToEndSettings(max_steps=17), "e", target_cur=0.375)).info


def test_losses_are_checked_once_a_trajectory(train_tiny, monkeypatch):
    """One exchange and one wait for the device in as many steps."""
    settled = []

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2:  # else gradients
            settled.append(len(tensor))
        return tensor

    monkeypatch.setattr("training.logs.distributed.mean", mean)
    train_tiny(harmonica(20, proxy="none"), ckpt_every=100)
    assert settled == [3, 4, 4, 4]  # lines of the log at 5, 10, 15, 20; 5 of the 20 steps have no loss


@pytest.mark.parametrize(("settings", "ranks", "said"), [
    (TrainSettings(HarmonicaSettings(), global_batch_size=4), 3, "by 3 ranks: it is 2 .* a multiple of 6"),
    (TrainSettings(HarmonicaSettings(cfg_scale=1.0), global_batch_size=4), 3, "size 4 .* a multiple of 3"),
    (TrainSettings(EndToEndSettings(trajectories=4)), 3, "--trajectories 4 .* take a multiple of 3"),
    (TrainSettings(L2CSettings(data="x")), 16, "--groups 8 cannot be shared by 16 ranks, take a multiple"),
    (TrainSettings(L2CSettings(data="x"), global_batch_size=8), 3, "--global-batch-size 8 .* multiple of 3"),
])  # fmt: skip
def test_what_ranks_cannot_share_is_refused(settings, ranks, said):
    check_shared(settings, 1)
    check_shared(settings, 2)
    with pytest.raises(ValueError, match=said):
        check_shared(settings, ranks)


def test_a_target_is_a_cur_or_a_speedup(tiny_model):
    chain = create_diffusion("10")
    assert choose_target(TrainSettings(), tiny_model, chain) is None
    cur = choose_target(TrainSettings(target_cur=0.4), tiny_model, chain)
    assert (cur.kind, cur.value, cur.num_steps, cur.even_rows) == ("cur", 0.4, 10, False)
    method = L2CSettings(data="x", ste_threshold=0.3)
    speedup = choose_target(TrainSettings(method, target_speedup=1.2), tiny_model, chain)
    assert (speedup.kind, speedup.threshold, speedup.even_rows) == ("speedup", 0.3, True)
    every_row = L2CSettings(data="x", every_row=True)
    assert not choose_target(TrainSettings(every_row, target_cur=0.6), tiny_model, chain).even_rows


def test_a_model_without_a_null_label_is_not_guided(train_tiny):
    train_tiny.model.has_null_label = False
    with pytest.raises(ValueError, match=r"guidance 1\.5 needs a null label"):
        train_tiny(harmonica(4))


def test_data_loss_without_effect_is_said(train_tiny, monkeypatch):
    monkeypatch.setattr(Run, "train", lambda _: None)
    train_tiny.model.learn_sigma = False
    with pytest.warns(UserWarning, match="--data-loss has no effect: this model predicts eps alone"):
        train_tiny(harmonica(4, data_loss="eps"))
