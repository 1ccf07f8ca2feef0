"""Tiny parts of pipelines of diffusers, all seeded, and a folder of one: transformer, VAE, T5, tokenizer."""

from pathlib import Path

import diffusers
import torch
from tiny_transformers import TEXT, dit, flux, pixart, sd3, seeded
from torch import Tensor

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


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(n: int) -> dict:
    ones = torch.ones(n, TEXT, dtype=torch.long)
    return {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}


def request(pipe, n: int = 1, steps: int = 6, seed: int = 0, side: int = 8, **more) -> Tensor:
    """The final latents of a request for n images, its prompt and noise from `seed`."""
    kind = type(pipe).__name__
    common = {"num_inference_steps": steps, "guidance_scale": 4.0}
    common["generator"] = torch.Generator().manual_seed(seed)
    if kind.startswith("DiT"):
        images = pipe(class_labels=list(range(n)), output_type="np", **common, **more).images
        return torch.from_numpy(images)
    common |= {"output_type": "latent", "height": side, "width": side}
    if kind.startswith("PixArt"):
        prompts = {"prompt_embeds": draw(n, TEXT, 16, seed=seed), "use_resolution_binning": False}
        prompts |= {"negative_prompt": None, "negative_prompt_embeds": draw(n, TEXT, 16, seed=99)} | masked(n)
    elif kind.startswith("StableDiffusion3"):
        prompts = {
            "prompt_embeds": draw(n, TEXT, 32, seed=seed),
            "pooled_prompt_embeds": draw(n, 16, seed=seed),
        }
        prompts["negative_prompt_embeds"] = draw(n, TEXT, 32, seed=98)
        prompts["negative_pooled_prompt_embeds"] = draw(n, 16, seed=97)
    else:
        prompts = {
            "prompt_embeds": draw(n, TEXT, 32, seed=seed),
            "pooled_prompt_embeds": draw(n, 32, seed=seed),
        }
    return pipe(**prompts, **common, **more).images


def pixart_alpha():
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "transformer": pixart()}
    return diffusers.PixArtAlphaPipeline(**parts, scheduler=diffusers.DPMSolverMultistepScheduler())


def pixart_sigma():
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "transformer": pixart()}
    return diffusers.PixArtSigmaPipeline(**parts, scheduler=diffusers.DDIMScheduler(clip_sample=False))


def dit_pipeline():
    return diffusers.DiTPipeline(
        transformer=dit(num_embeds_ada_norm=1000), vae=vae(), scheduler=diffusers.DDIMScheduler()
    )


def sd3_pipeline():
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return diffusers.StableDiffusion3Pipeline(
        transformer=sd3(),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(names),
    )


def flux_pipeline():
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return diffusers.FluxPipeline(
        transformer=flux(),
        vae=vae(4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(names),
    )


PIPELINES = {
    "pixart-alpha": pixart_alpha, "pixart-sigma": pixart_sigma, "dit": dit_pipeline, "sd3": sd3_pipeline,
    "flux": flux_pipeline,
}  # fmt: skip
