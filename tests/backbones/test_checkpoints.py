import argparse
import copy
import json
import re
from functools import partial

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from backbones.checkpoints import load_checkpoint
from backbones.loading import load_model, randomize
from models import DiT, DiT_models


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


def test_positions_that_a_file_leaves_out_are_there(tmp_path, monkeypatch, source):
    """`load_model` draws no initial weights, but positions are in no need of a file."""
    own = partial(DiT, patch_size=2, hidden_size=32, depth=2, num_heads=2)
    monkeypatch.setitem(DiT_models, "DiT-own", own)
    state = source.state_dict()
    del state["pos_embed"]
    save_file(state, tmp_path / "w.safetensors")
    model = load_model("DiT-own", tmp_path / "w.safetensors", image_size=64, num_classes=7)
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


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "'module' taken out"),
        (lambda state: {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}}, "'state_dict'"),
        (lambda state: {k.replace(".", "._orig_mod.", 1): v for k, v in state.items()}, "'_orig_mod' taken"),
        (lambda state: {f"_fsdp_wrapped_module.{k}": v for k, v in state.items()}, "_fsdp_wrapped_module"),
        (lambda state: {"model": state, "epoch": 3, "ema": None}, "'model'; no DiT is in its 'ema'"),
        (lambda state: {"ema": {f"module.{k}": v for k, v in state.items()}, "model": zeros(state)}, "'ema'"),
        (lambda state: {"a": {"net_ema": state, "net": zeros(state)}}, "'a.net_ema'"),
        (lambda state: {f"module.{k}": v for k, v in state.items()} | {"n_averaged": torch.ones(())}, ""),
        (
            lambda state: {f"ema_model.{k}": v for k, v in state.items()}
            | {f"online_model.{k}": v for k, v in zeros(state).items()},
            "names that begin with 'ema_model.'",
        ),
        (
            lambda state: {"state": {f"net.{k}": v for k, v in state.items()} | {"vae.w": torch.ones(2)}},
            "not read: 1 entries of vae",
        ),
        (lambda state: {"model": state, "optimizer": {"exp_avg": zeros(state)}}, "'model'"),
    ],
)  # fmt: skip
def test_wrapped_state_dicts_are_found_and_said(tmp_path, source, target, wrap, words):
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    said = load_checkpoint(target, tmp_path / "w.pt")
    assert same_output(target, source) == 0.0
    assert words in said
    assert "\n" not in said


def zeros(state: dict) -> dict:
    """What is not wanted: a state dict of the same names."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def test_which_of_several_state_dicts_is_not_guessed(tmp_path, source, target):
    state = source.state_dict()
    for content, words in (
        ({"student": state, "teacher": state}, "holds 2 DiT state dicts ('student'; 'teacher')"),
        ({"ema_0.99": state, "ema_0.9": state, "model": state}, "holds 2 DiT state dicts"),
        ({"ema": {"shadow_params": [*state.values()]}}, "'shadow_params' has no names"),
        ({"epoch": 3, "lr": 0.1}, "holds no DiT: its entries are 'epoch', 'lr'"),
        ({}, "its entries are none"),
    ):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=re.escape(words)):
            load_checkpoint(target, tmp_path / "w.pt")


def test_what_a_file_is_its_content_says(tmp_path, source, target):
    save_file(source.state_dict(), tmp_path / "a.pt")
    torch.save(source.state_dict(), tmp_path / "b.safetensors")
    torch.save(source.state_dict(), tmp_path / "c")
    for name in ("a.pt", "b.safetensors", "c"):
        model = copy.deepcopy(target)
        load_checkpoint(model, tmp_path / name)
        assert same_output(model, source) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(tmp_path, source, target, dtype):
    save_file(
        {name: tensor.to(dtype) for name, tensor in source.state_dict().items()}, tmp_path / "w.safetensors"
    )
    load_checkpoint(target, tmp_path / "w.safetensors")
    assert same_output(target, source) < (1e-6 if dtype == torch.float64 else 0.1)


WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = "blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to(torch.int8), f"{NAME} is int8"),
        (lambda w: w > 0, f"{NAME} is bool"),
        (lambda w: w.to(torch.complex64), f"{NAME} is complex64"),
        (lambda w: w.to(torch.float8_e4m3fn), f"{NAME} is float8_e4m3fn"),
        (lambda w: w.index_fill(0, torch.tensor([3]), torch.nan), f"{NAME} has 32 of 4096 values that"),
        (lambda w: w.index_fill(1, torch.tensor([0]), -torch.inf), f"{NAME} has 128 of 4096 values"),
        (lambda w: w.double() * 1e300, f"{NAME} has 4096 of 4096 values that are not finite"),
        (lambda w: w.to("meta"), f"{NAME} holds no data"),
        (lambda w: w.to_sparse(), f"{NAME} has layout torch.sparse_coo"),
    ],
)  # fmt: skip
def test_what_is_no_weight_is_named_and_refused(tmp_path, source, target, change, words):
    state = source.state_dict()
    state[NAME] = change(state[NAME])
    torch.save(state, tmp_path / "w.pt")
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=r"w\.pt: ") as info:
        load_checkpoint(target, tmp_path / "w.pt")
    assert words in str(info.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def build(**changes) -> DiT:
    torch.manual_seed(1)
    model = DiT(
        **{"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 7} | changes
    )
    randomize(model)
    return model.eval()


def test_no_null_label_is_said_with_both_readings(tmp_path, target):
    """Seven rows are seven classes without a null label, or six with one: the file does not tell which."""
    save_file(build(class_dropout_prob=0).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="7 rows of labels, not 8") as info:
        load_checkpoint(target, tmp_path / "w.safetensors")
    assert "7 classes without a null label (--num-classes 7 --class-dropout-prob 0" in str(info.value)
    assert "6 classes and the null label (--num-classes 6)" in str(info.value)
    plain = build(class_dropout_prob=0)
    assert "7 rows of labels: 7 classes without a null label" in load_checkpoint(
        plain, tmp_path / "w.safetensors"
    )
    as_null = build(num_classes=6)
    assert "6 classes and the null label" in load_checkpoint(as_null, tmp_path / "w.safetensors")


def test_the_number_of_classes_beside_the_weights_decides(tmp_path):
    """DiT's training saves its arguments: there `--num-classes 6` would take class 6 for the null label."""
    state = build(class_dropout_prob=0).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(num_classes=7)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="7 classes without a null label") as info:
        load_checkpoint(build(num_classes=6), tmp_path / "w.pt")
    assert "--num-classes 6" not in str(info.value)
    load_checkpoint(build(class_dropout_prob=0), tmp_path / "w.pt")
    torch.save({"ema": state, "args": {"num_classes": 6}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"6 classes and the null label \(--num-classes 6\)"):
        load_checkpoint(build(class_dropout_prob=0), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learn_sigma": False}, "no learned variance (--no-learn-sigma)"),
        ({"depth": 3}, "depth 3, width 32 and patch size 2 (no --model has it), not 2, 32 and 2"),
        ({"depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 8}, "(--model DiT-S/8), not 2, 32"),
        ({"input_size": 16}, "inputs of 16 x 16 (--image-size 128 with a VAE of factor 8), not 8"),
        ({"in_channels": 16}, "16 input channels, not 4"),
        ({"mlp_ratio": 2.0}, "MLPs of 64, not 128"),
    ],
)
def test_another_model_is_told_by_its_state_dict(tmp_path, target, changes, words):
    save_file(build(**changes).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="is another model's: it has") as info:
        load_checkpoint(target, tmp_path / "w.safetensors")
    assert words in str(info.value)
    load_checkpoint(build(**changes), tmp_path / "w.safetensors")


def test_learned_variance_that_is_not_asked_for_is_said(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="a learned variance"):
        load_checkpoint(build(learn_sigma=False), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "path", ["fp16", "shards", f"shards/{WEIGHTS}.index.json", "bin", "hub", "hub/models--a--b", "accelerate"]
)
def test_folders_of_diffusers_and_its_like(tmp_path, target, path):
    """Half precision, shards, pickles, the root in the Hub's cache of a pipeline, accelerate's names."""
    theirs = diffusers_model()
    wanted = copy.deepcopy(target)
    theirs.save_pretrained(tmp_path / "plain")
    load_checkpoint(wanted, tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "fp16", variant="fp16")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    snapshots = tmp_path / "hub" / "models--a--b" / "snapshots"
    theirs.save_pretrained(snapshots / "0123" / "transformer")
    (snapshots / "older").mkdir()
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("0123\n")
    (tmp_path / "accelerate").mkdir()
    save_file(theirs.state_dict(), tmp_path / "accelerate" / "model.safetensors")
    load_checkpoint(target, tmp_path / path)
    assert same_output(target, wanted) == 0.0


def test_folders_that_lack_something_say_what(tmp_path, target):
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards").glob("*-of-*"))
    assert len(shards) > 3
    content = shards[1].read_bytes()
    shards[1].unlink()
    cases = [
        (FileNotFoundError, "shards", f"{shards[1].name} does not exist, one of the {len(shards)} shards")
    ]

    def refused(error, path, words):
        with pytest.raises(error) as info:
            load_checkpoint(copy.deepcopy(target), tmp_path / path)
        assert words in str(info.value)
        assert "\n" not in str(info.value)

    refused(*cases[0])
    shards[1].write_bytes(content[:-10])
    refused(ValueError, "shards", f"{shards[1].name} is no safetensors file or only a part of one")
    shards[1].write_bytes(shards[0].read_bytes())
    refused(ValueError, "shards", f"{shards[1].name} does not hold what")
    refused(ValueError, f"shards/{shards[0].name}", "is one of several shards")
    index = tmp_path / "shards" / f"{WEIGHTS}.index.json"
    index.write_text("{}")
    refused(ValueError, "shards", "is no index of shards")
    index.unlink()
    refused(FileNotFoundError, "shards", "but not their index")
    theirs.save_pretrained(tmp_path / "absent")
    weights = tmp_path / "absent" / WEIGHTS
    weights.unlink()
    refused(FileNotFoundError, "absent", "a config.json without the weights")
    weights.symlink_to(tmp_path / "blobs" / "0123")
    refused(FileNotFoundError, "absent", "is a link to what is not there")
    refused(FileNotFoundError, f"absent/{WEIGHTS}", "is a link to")
    (tmp_path / "models--a--b" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "models--a--b" / "snapshots" / "2").mkdir()
    refused(ValueError, "models--a--b", "holds 2 snapshots, refs/main names none of them")
    (tmp_path / "run").mkdir()
    torch.save({}, tmp_path / "run" / "0001.pt")
    refused(FileNotFoundError, "run", "it has 0001.pt: give a file")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "is of a PixArtTransformer2DModel"),
        ({"sample_size": 16}, "inputs of 16 x 16 (--image-size 128"),
        ({"num_attention_heads": 4}, "4 heads, not 2"),
    ],
)
def test_config_beside_the_weights_is_heeded(tmp_path, target, entry, words):
    """A 512 px folder has the tensors of a 256 px one: its config alone tells them apart."""
    diffusers_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(ValueError) as info:  # noqa: PT011
        load_checkpoint(target, tmp_path)
    assert words in str(info.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (bytes(5000), "begins with 4096 zero bytes"),
        (b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_lies_in_place_of_weights_is_told(tmp_path, target, content, words, suffix):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(target, tmp_path / f"w{suffix}")
