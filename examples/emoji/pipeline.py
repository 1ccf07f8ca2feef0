"""The emoji models as diffusers' own PixArtAlphaPipeline, from a prompt or from token states."""

from pathlib import Path

import torch
from torch import Tensor

from examples.emoji.text import MAX_TOKENS, TokenStates, load_encoder


def assemble(transformer, vae_folder: str | Path):
    """A pipeline without a text encoder, of a transformer and the VAE in a folder."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline  # slow to import

    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    pipe = PixArtAlphaPipeline(None, None, vae, transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: str | Path, text_encoder: str | None = None):
    """The pipeline in `folder` with its text encoder: `pipe("green heart, 3d style").images`."""
    from diffusers import PixArtAlphaPipeline  # slow to import

    tokenizer, encoder = load_encoder(text_encoder)
    return PixArtAlphaPipeline.from_pretrained(folder, tokenizer=tokenizer, text_encoder=encoder)


@torch.no_grad()
def draw(
    pipe,
    text: TokenStates,
    captions: Tensor,
    null_caption: int,
    num_steps: int = 20,
    cfg_scale: float = 4.0,
    seed: int = 0,
) -> Tensor:
    """uint8 pictures (n, 64, 64, 3) of captions (n,), indices into `text`; picture i starts from seed + i."""
    states, mask = text.batch(torch.cat([captions, captions.new_tensor([null_caption])]))
    n = len(captions)
    device = states.device
    noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
    latents = pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=states[:n],
        prompt_attention_mask=mask[:n],
        negative_prompt_embeds=states[n:].repeat(n, 1, 1),
        negative_prompt_attention_mask=mask[n:].repeat(n, 1),
        latents=torch.stack(noise).to(device),
        num_inference_steps=num_steps,
        guidance_scale=cfg_scale,
        height=64,
        width=64,
        use_resolution_binning=False,
        max_sequence_length=MAX_TOKENS,
        output_type="latent",
    ).images
    return decode(pipe, latents)


@torch.no_grad()
def decode(pipe, latents: Tensor) -> Tensor:
    """uint8 pictures (n, 64, 64, 3) of latents (n, 4, 16, 16)."""
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (decoded.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu()
