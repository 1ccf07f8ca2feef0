import pytest
import torch
from conftest import relative_error

from models import DiT, DiT_models


def test_forward_matches_the_released_model(reference_model, expected):
    out = reference_model(expected["forward.x"], expected["forward.t"], expected["forward.y"])
    assert relative_error(out, expected["forward.out"]) < 1e-5


def test_position_embedding_is_the_official_one(case, reference_model):
    """The table is computed, not read: the weights file holds the official one."""
    assert torch.equal(DiT(**case["config"]).pos_embed, reference_model.pos_embed)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("DiT-XL/2", 675_129_632, 118.64), ("DiT-B/4", None, 5.56), ("DiT-S/8", None, 0.36)],
)
def test_published_sizes(name, parameters, gmacs):
    """Parameter count of the official checkpoint; MACs of Table 1 of the DiT paper (its "Gflops")."""
    with torch.device("meta"):
        model = DiT_models[name]()
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert (sum(model.branch_macs) + model.other_macs) / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert len(model.branches) == model.num_branches == 2 * len(model.blocks)


def test_macs_agree_with_counted_flops(tiny_model, tiny_batch):
    """torch counts 2 FLOPs per MAC of linear layers, convolutions and attention products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    noise, labels = tiny_batch
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others may go uncounted
        tiny_model(noise, torch.tensor([1, 2, 3]), labels)
    macs = sum(tiny_model.branch_macs) + tiny_model.other_macs
    assert counter.get_total_flops() == pytest.approx(2 * len(noise) * macs, rel=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_guidance_touches_the_first_three_eps_channels_only(channels):
    torch.manual_seed(0)
    model = DiT(input_size=4, in_channels=channels, hidden_size=24, depth=1, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    half = torch.randn(2, channels, 4, 4)
    x = torch.cat([half, torch.full_like(half, torch.nan)])  # the second half is never read
    t, y = torch.tensor([3] * 4), torch.tensor([1, 2, 5, 5])
    with torch.no_grad():
        plain = model(torch.cat([half, half]), t, y)
        guided = model.forward_with_cfg(x, t, y, 1.7)
    cond, uncond = plain.chunk(2)
    eps = min(3, channels)
    mixed = uncond[:, :eps] + 1.7 * (cond[:, :eps] - uncond[:, :eps])
    torch.testing.assert_close(guided[:, :eps], torch.cat([mixed, mixed]))
    assert torch.equal(guided[:, eps:], plain[:, eps:])


def test_every_branch_asks_the_cache_once_in_order(tiny_model, tiny_batch):
    noise, labels = tiny_batch
    asked = []

    def policy(branch, compute):
        asked.append(branch)
        return compute()

    plain = tiny_model(noise, torch.tensor([9, 9, 9]), labels)
    assert torch.equal(tiny_model(noise, torch.tensor([9, 9, 9]), labels, policy), plain)
    assert asked == [0, 1, 2, 3]
    assert tiny_model.branches == ("0.attn", "0.mlp", "1.attn", "1.mlp")


def test_branch_output_is_taken_before_its_gate(tiny_model):
    block = tiny_model.blocks[0]
    x, c = torch.randn(3, 4, 24), torch.randn(3, 24)
    gate = block.adaLN_modulation(c).chunk(6, dim=1)[2]
    constant = torch.randn(3, 4, 24)
    attn, mlp = tiny_model.modulations(c[None])[0].branches[:2]
    out = block(x, attn, mlp, lambda branch, _: constant if branch == 0 else torch.zeros_like(x))
    torch.testing.assert_close(out, x + gate[:, None] * constant)


def test_label_dropout_uses_the_null_label(tiny_model):
    embedder = tiny_model.y_embedder
    embedder.train()
    torch.manual_seed(0)
    rows = embedder(torch.zeros(4000, dtype=torch.long))
    embedder.eval()
    null = embedder.embedding_table.weight[5]
    share = (rows == null).all(1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.02)
    assert ((rows == null).all(1) | (rows == embedder.embedding_table.weight[0]).all(1)).all()


@pytest.mark.parametrize("arguments", [{"input_size": 5}, {"hidden_size": 25, "num_heads": 2}])
def test_sizes_that_do_not_divide_are_refused(arguments):
    with pytest.raises(ValueError, match="not a multiple"):
        DiT(**{"input_size": 4, "hidden_size": 24, "num_heads": 2, "depth": 1} | arguments)
