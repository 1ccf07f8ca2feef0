"""CLIP score on a small seeded CLIP in a folder, through evaluate.py."""

import json
import math
import re

import numpy as np
import pytest
import torch
from commands import error_line, run
from PIL import Image

from metrics.clip_score import prompts_as_lines, read_lines

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "<start>", "<end>", "a", "green", "heart", "red", "apple", "style", "blue"]
PROMPTS = ["a green heart", "red", "a style", "blue apple", "heart", "a a a a a a a a a a a a"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of a few words and 32 pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="<start>",
        eos_token="<end>",
    )
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = common | {"vocab_size": len(WORDS), "max_position_embeddings": 10, "eos_token_id": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config=text, vision_config=common | {"image_size": 32, "patch_size": 8}, projection_dim=8
        )
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    transformers.CLIPProcessor(image_processor=pictures, tokenizer=fast).save_pretrained(folder)
    return folder


@pytest.fixture
def samples(tmp_path):
    """Two files of six pictures, 40 x 40, with prompts beside the first."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        pictures = generator.integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures)
    (tmp_path / "a.npz.prompts.txt").write_text(prompts_as_lines(PROMPTS))
    return tmp_path


def by_hand(clip, path, prompts) -> torch.Tensor:
    model, processor = (
        kind.from_pretrained(clip) for kind in (transformers.CLIPModel, transformers.CLIPProcessor)
    )
    scores = []
    with np.load(path) as file, torch.no_grad():
        for picture, prompt in zip(file["arr_0"], prompts, strict=True):
            inputs = processor(
                text=[prompt], images=Image.fromarray(picture), return_tensors="pt", truncation=True,
                max_length=10,
            )  # fmt: skip
            output = model(**inputs)
            one, other = output.image_embeds[0], output.text_embeds[0]
            scores.append(100 * (one @ other) / one.norm() / other.norm())
    return torch.stack(scores).double()


def evaluated(*arguments) -> tuple[dict, str]:
    text = run("evaluate.py", "--device", "cpu", *arguments)
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1]), text


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_scores_are_those_of_clip_itself(clip, samples, batch_size):
    found, text = evaluated(samples / "a.npz", "--clip", clip, "--batch-size", batch_size)
    wanted = by_hand(clip, samples / "a.npz", PROMPTS)
    assert wanted.std() > 1
    assert found["clip_score"] == pytest.approx(wanted.mean().item(), rel=1e-4)
    error = (wanted.var(correction=1) / 6).sqrt().item()
    assert found["clip_score_error"] == pytest.approx(error, rel=1e-4)
    assert "1 of 6 prompts are cut after 10 tokens" in text


def test_pairs_have_a_difference(clip, samples):
    found, _ = evaluated(samples / "b.npz", "--clip", clip, "--prompts", samples / "a.npz.prompts.txt",
                         "--paired", samples / "a.npz")  # fmt: skip
    own, other = (by_hand(clip, samples / f"{name}.npz", PROMPTS) for name in "ba")
    difference = own - other
    assert found["clip_score"] == pytest.approx(own.mean().item(), rel=1e-4)
    assert found["clip_score_paired"] == pytest.approx(other.mean().item(), rel=1e-4)
    assert found["clip_score_difference"] == pytest.approx(difference.mean().item(), rel=1e-3)
    error = difference.std().item() / math.sqrt(6)
    assert found["clip_score_difference_error"] == pytest.approx(error, rel=1e-3)
    assert found["mse"] > 0
    (samples / "b.npz.prompts.txt").write_text(prompts_as_lines(PROMPTS[::-1]))
    line = error_line("evaluate.py", samples / "a.npz", "--paired", samples / "b.npz")
    assert "pairs need the same" in line


def test_what_does_not_fit_is_one_line(clip, samples, monkeypatch):
    short = samples / "short.txt"
    short.write_text("red\nblue\n")
    asked = ["evaluate.py", samples / "a.npz", "--device", "cpu", "--clip"]
    assert "short.txt holds 2 prompts" in error_line(*asked, clip, "--prompts", short)
    line = error_line("evaluate.py", samples / "b.npz", "--clip", clip)
    assert re.search(r"b\.npz\.prompts\.txt does not exist; give --prompts FILE", line)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nowhere = error_line(*asked, samples / "nowhere")
    assert "nowhere cannot be loaded" in nowhere
    assert "give the folder of a CLIP model" in nowhere
    state = {k: v for k, v in transformers.CLIPModel.from_pretrained(clip).state_dict().items()
             if k != "visual_projection.weight"}  # fmt: skip
    cut = samples / "cut"
    transformers.CLIPModel.from_pretrained(clip).save_pretrained(cut, state_dict=state)
    assert "such as visual_projection.weight" in error_line(*asked, cut)
    transformers.BertConfig(hidden_size=16).save_pretrained(samples / "bert")
    assert "it is of type bert, not clip" in error_line(*asked, samples / "bert")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "--clip needs transformers" in error_line(*asked, clip)


def test_prompts_keep_their_lines(tmp_path):
    texts = ["two\nlines", "", "  wide \u2028 space", "a"]
    (tmp_path / "p.txt").write_text(prompts_as_lines(texts), encoding="utf-8")
    assert read_lines(tmp_path / "p.txt") == ["two lines", "", "wide space", "a"]
