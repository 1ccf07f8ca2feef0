"""Prompts as embeddings on disk: encoded once, resumed, read without the encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import save_text_encoder

from backbones import prompts as module
from backbones.prompts import encode_prompts, open_prompts, read_prompts
from common.files import writing

transformers = pytest.importorskip("transformers")

TEXTS = ["a green heart", "Red apple ", "style"]
L = 6


@pytest.fixture(scope="module", params=["t5", "bert"])
def encoder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    save_text_encoder(folder, request.param)
    return str(folder)


def test_states_are_the_encoders(encoder, tmp_path):
    found = encode_prompts(TEXTS, encoder, L, tmp_path, batch_size=2)
    assert (len(found), found.num_tokens, found.channels) == (3, L, 16)
    assert isinstance(found.states, np.memmap)
    tokenizer, model = module.load_encoder(encoder)
    for number, text in enumerate(["a green heart", "red apple", "style", ""]):
        tokens = tokenizer(text, padding="max_length", max_length=L, return_tensors="pt")
        with torch.no_grad():
            wanted = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        states, mask = found.batch([number])
        assert torch.equal(mask, tokens.attention_mask.bool())
        assert torch.allclose(states, wanted.half().float(), atol=2e-3)


def test_the_second_time_nothing_is_encoded(encoder, tmp_path, monkeypatch):
    first = encode_prompts(TEXTS, encoder, L, tmp_path)
    monkeypatch.setattr(module, "load_encoder", None)  # calling it would fail
    again = encode_prompts(TEXTS, encoder, L, tmp_path)
    assert np.array_equal(first.states, again.states)


def test_other_texts_or_lengths_lie_elsewhere(encoder, tmp_path):
    encode_prompts(TEXTS, encoder, L, tmp_path)
    encode_prompts(TEXTS[:2], encoder, L, tmp_path)
    encode_prompts(TEXTS, encoder, L + 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_encoding_goes_on(encoder, tmp_path, monkeypatch):
    whole = encode_prompts(TEXTS, encoder, L, tmp_path / "whole", batch_size=1)
    calls, load = [], module.load_encoder

    def breaking(source):
        tokenizer, model = load(source)

        def count(*_):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(count)
        return tokenizer, model

    monkeypatch.setattr(module, "load_encoder", breaking)
    with pytest.raises(KeyboardInterrupt):
        encode_prompts(TEXTS, encoder, L, tmp_path / "parts", batch_size=1)
    (place,) = (tmp_path / "parts").iterdir()
    with pytest.raises(ValueError, match="is not complete"):
        open_prompts(place)
    assert json.loads((place / "info.json").read_text())["done"] == 2
    parts = encode_prompts(TEXTS, encoder, L, tmp_path / "parts", batch_size=1)
    assert len(calls) == 3 + 2
    assert np.array_equal(parts.states, whole.states)
    assert np.array_equal(parts.lengths, whole.lengths)


def test_an_absent_encoder_is_one_line(tmp_path, monkeypatch):
    def absent(*_, **__):
        raise OSError("nowhere is not a local folder\nand more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(OSError, match="the text encoder nowhere cannot be had"):
        encode_prompts(TEXTS, "nowhere", L, tmp_path)


def test_prompt_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_prompts(tmp_path / "binary.txt")


def test_what_is_complete_is_read_while_another_process_holds_the_folder(encoder, tmp_path):
    """Several ranks read at once what the first one wrote."""
    encode_prompts(TEXTS, encoder, L, tmp_path)
    (place,) = tmp_path.iterdir()
    with writing(place):
        assert len(encode_prompts(TEXTS, encoder, L, tmp_path)) == 3


def test_another_training_of_an_encoder_is_another_encoder(encoder, tmp_path):
    """The same folder's name and config, one weight changed everywhere."""
    encode_prompts(TEXTS, encoder, L, tmp_path / "embeddings")
    copied = tmp_path / Path(encoder).name
    shutil.copytree(encoder, copied)
    encode_prompts(TEXTS, copied, L, tmp_path / "embeddings")
    assert len(list((tmp_path / "embeddings").iterdir())) == 1
    file = copied / "text_encoder" / "model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(file).items()}, file, {"format": "pt"})
    encode_prompts(TEXTS, copied, L, tmp_path / "embeddings")
    assert len(list((tmp_path / "embeddings").iterdir())) == 2
