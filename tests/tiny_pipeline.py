"""Tiny parts of pipelines of diffusers, all seeded, and a folder of one: transformer, VAE, T5, tokenizer."""

from pathlib import Path

import torch
from tiny_transformers import pixart, seeded

WORDS = ["[PAD]", "[UNK]", "</s>", "a", "green", "heart", "red", "apple", "style"]


def save_text_encoder(folder: Path, kind: str = "t5", width: int = 16) -> None:
    """A tokenizer of a few words in `folder`/tokenizer and an encoder in `folder`/text_encoder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    fast.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            config = transformers.T5Config(
                vocab_size=9, d_model=width, d_kv=4, d_ff=32, num_layers=2, num_heads=4
            )
            model = transformers.T5Model(config)
        else:
            config = transformers.BertConfig(
                vocab_size=9,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=32,
            )
            model = transformers.BertModel(config)
    model.save_pretrained(folder / "text_encoder")


def save_pipeline(folder: Path) -> Path:
    pixart().save_pretrained(folder / "transformer")
    seeded(
        "AutoencoderKL", block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=0.18,
    ).save_pretrained(folder / "vae")  # fmt: skip
    save_text_encoder(folder)
    return folder


def vae(latent_channels: int = 4):
    """An AutoencoderKL of factor 1."""
    return seeded(
        "AutoencoderKL", block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=latent_channels, norm_num_groups=4,
        shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def quiet(pipe):
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
