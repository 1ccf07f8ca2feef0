"""The same numbers from two roads: our DiT, and diffusers' DiT with the same weights through hooks."""

import pytest
import torch
from tiny_transformers import dit

from backbones.diffusers_dit import DiffusersDiT, as_official
from diffusion import create_diffusion
from models import DiT
from objectives import train_trajectory
from router import Router, Schedule
from sampling.loop import generate
from schedules.forecasts import taylor

T, CLASSES = 6, 10


@pytest.fixture(scope="module")
def pair() -> tuple[DiT, DiffusersDiT]:
    other = as_official(dit(num_embeds_ada_norm=CLASSES)).requires_grad_(False)
    ours = DiT(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=CLASSES)
    ours.load_state_dict(translated(other.state_dict(), ours), strict=True)
    return ours.eval().requires_grad_(False), DiffusersDiT(other)


def translated(state: dict, ours: DiT) -> dict:
    """diffusers' names in official ones; its blocks have an embedder each, here all alike."""
    renamed = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
    renamed["final_layer.adaLN_modulation.1"] = "proj_out_1"
    first = "transformer_blocks.0.norm1.emb"
    renamed |= {f"t_embedder.mlp.{2 * k}": f"{first}.timestep_embedder.linear_{k + 1}" for k in range(2)}
    for i in range(2):
        theirs, own = f"transformer_blocks.{i}", f"blocks.{i}"
        renamed |= {
            f"{own}.adaLN_modulation.1": f"{theirs}.norm1.linear",
            f"{own}.attn.proj": f"{theirs}.attn1.to_out.0",
        }
        renamed |= {f"{own}.mlp.fc1": f"{theirs}.ff.net.0.proj", f"{own}.mlp.fc2": f"{theirs}.ff.net.2"}
    found = {
        f"{own}.{kind}": state[f"{theirs}.{kind}"]
        for own, theirs in renamed.items()
        for kind in ("weight", "bias")
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{i}.attn1.to_{one}.{kind}"] for one in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    found["y_embedder.embedding_table.weight"] = state[f"{first}.class_embedder.embedding_table.weight"]
    for name, value in state.items():  # one embedder for all blocks, as in the official model
        if ".norm1.emb." in name:
            value.copy_(state[name.replace(name.split(".")[1], "0", 1)])
    return found | {"pos_embed": ours.pos_embed}


def setting(n: int = 3):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["uncached", "reuse", "forecast"])
def test_sampling(pair, kind, cfg_scale):
    noise, labels = setting()
    schedule = None
    if kind != "uncached":
        schedule = Schedule(torch.rand(T, 4, generator=torch.Generator().manual_seed(3)) > 0.4)
    if kind == "forecast":
        schedule = taylor(schedule, 2)
    ours, theirs = (
        generate(model, create_diffusion(str(T)), labels, noise, cfg_scale, schedule=schedule)
        for model in pair
    )
    assert (ours - theirs).abs().max() < 1e-6 * ours.abs().max()


def test_macs_and_branches(pair):
    ours, theirs = pair
    assert theirs.branch_macs == ours.branch_macs
    assert theirs.branch_size == ours.branch_size
    embedding = (256 + 32) * 32  # diffusers embeds the timestep in both blocks, and at the end once more
    assert theirs.other_macs == ours.other_macs + 2 * embedding


def test_training(pair):
    """SDT: the logits after two trajectories."""
    noise, labels = setting()
    logits = []
    for model in pair:
        router = Router(T, 4, torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(router.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(2):
            for _ in train_trajectory(
                model,
                create_diffusion(str(T)),
                router,
                optimizer,
                noise,
                labels,
                1.5,
                0.1,
                torch.ones(T),
                1e-5,
            ):
                pass
        logits.append(router.logits)
    assert torch.allclose(*logits, atol=1e-5)
