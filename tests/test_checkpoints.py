import argparse
import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from checkpoints import load_checkpoint
from models import DiT
from sampling import randomize


@pytest.fixture
def source() -> DiT:
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=7).eval()
    randomize(model)
    return model


@pytest.fixture
def target() -> DiT:
    return DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=7).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and y: the first, a middle and the last timestep; the null label among the labels."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0, 500, 999]), torch.tensor([0, 6, 7])


def same_output(a, b) -> float:
    with torch.no_grad():
        return (a(*inputs()) - b(*inputs())).abs().max().item()


def test_official_layouts_load(tmp_path, source, target):
    state = source.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save(
        {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(model="x")}, tmp_path / "run.pt"
    )
    save_file(state, tmp_path / "w.safetensors")
    for name in ("bare.pt", "run.pt", "w.safetensors"):
        model = copy.deepcopy(target)
        load_checkpoint(model, tmp_path / name)
        assert same_output(model, source) == 0.0


def diffusers_model(depth: int = 2) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=8, patch_size=2, num_embeds_ada_norm=7, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip
    # One embedder in the official model: the copies agree.
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    return model


def test_diffusers_checkpoint_gives_the_same_function(tmp_path, target):
    """With diffusers' two deviations (frequency shift, LayerNorm eps) set to the official model's."""
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    with torch.no_grad():
        reference = theirs(*inputs()).sample
        for path in (
            "pipeline",
            "pipeline/transformer",
            "pipeline/transformer/diffusion_pytorch_model.safetensors",
        ):
            model = copy.deepcopy(target)
            load_checkpoint(model, tmp_path / path)
            assert (model(*inputs()) - reference).abs().max() < 1e-5 * reference.abs().max()


def test_diffusers_embedders_that_differ_are_refused(tmp_path, target):
    theirs = diffusers_model()
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight[0, 0] += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="block 1 has another"):
        load_checkpoint(target, tmp_path)


def test_diffusers_checkpoint_that_lacks_a_tensor_is_refused(tmp_path, target):
    state = diffusers_model().state_dict()
    del state["transformer_blocks.1.attn1.to_k.bias"]
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks transformer_blocks\.1\.attn1\.to_k\.bias"):
        load_checkpoint(target, tmp_path)


def test_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, source, target):
    state = source.state_dict()
    state["extra"] = state.pop("blocks.0.attn.qkv.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match="2 differences: blocks.0.attn.qkv.weight is missing; extra is unknown"
    ) as info:
        load_checkpoint(target, tmp_path / "w.pt")
    assert "\n" not in str(info.value)


def test_absent_and_damaged_files_are_named(tmp_path, target):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist"):
        load_checkpoint(target, tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        load_checkpoint(target, tmp_path)
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(b"x" * 100)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(target, tmp_path / name)
