"""The published command lines, word for word but for what must be small on two cores; and DiT-XL/2 itself."""

import os
import re
import shlex

import pytest
import torch
from commands import run, torchrun
from published import SAMPLE, TRAIN
from safetensors.torch import save_file

from backbones.loading import randomize
from models import DiT_models


def with_options(command: str, **options) -> list[str]:
    """The command's words, some options' values replaced."""
    words = shlex.split(command)
    for option, value in options.items():
        words[words.index(f"--{option.replace('_', '-')}") + 1] = str(value)
    return words


@pytest.mark.slow
def test_published_training_then_sampling(tmp_path):
    model = DiT_models["DiT-S/8"](input_size=32)
    randomize(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ckpt = ["--ckpt", str(tmp_path / "model.safetensors")]
    small = {"model": "DiT-S/8", "epochs": 2, "max_steps": 12, "global_batch_size": 4}
    small |= {"results_dir": tmp_path / "results"}
    torchrun(2, *with_options(TRAIN, **small), *ckpt)
    (folder,) = (tmp_path / "results").iterdir()
    assert (folder / "checkpoints" / "0000012.safetensors").exists()
    assert (folder / "schedule.png").exists()
    # The real VAE cannot be had everywhere; `none` previews the latents.
    arguments = with_options(SAMPLE, model="DiT-S/8", path=folder, vae="none")
    output = run(*arguments, *ckpt, "--output", str(tmp_path / "s.png"))
    assert "/ 240 branches computed" in output
    assert "per batch of 8" in output  # the eight published labels


@pytest.mark.slow
def test_dit_xl_2_is_saved_loaded_strictly_and_sampled(tmp_path):
    """2.7 GB of weights in the official layout through `sample.py --ckpt`, two steps of one image."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 14e9:
        pytest.skip("needs 14 GB of memory")
    model = DiT_models["DiT-XL/2"]()
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    torch.save(model.state_dict(), tmp_path / "DiT-XL-2-256x256.pt")
    del model
    output = run(
        "sample.py", "--ckpt", tmp_path / "DiT-XL-2-256x256.pt", "--vae", "none", "--num-sampling-steps", 2,
        "--labels", 207, "--repeats", 0, "--output", tmp_path / "xl.png",
    )  # fmt: skip
    assert re.search(r"DiT-XL/2, 675\.13 M parameters", output)
    assert (tmp_path / "xl.png").exists()
