"""Tiny parts of pipelines of diffusers, all seeded, and a folder of one: transformer, VAE, T5, tokenizer."""

from pathlib import Path

import diffusers
import torch
from tiny_transformers import TEXT, dit, flux, pixart, qwen, sana, sd3, seeded, wan
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


# ---- folders of whole pipelines, with encoders of the real classes


def _text_model(name: str, **config):
    """A tiny seeded text model of transformers, over the words above."""
    import transformers

    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(cls.config_class(vocab_size=9, **config)).eval()


def _tokenizer(length: int):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **names)


def _clip(name: str, width: int, pooled: int):
    return _text_model(
        name, hidden_size=width, projection_dim=pooled, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, eos_token_id=2, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def _t5(name: str, width: int):
    return _text_model(name, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)


def latent_vae(channels: int):
    """An AutoencoderKL of factor 8, with a shift."""
    return seeded(
        "AutoencoderKL", block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=2,
        shift_factor=0.1, scaling_factor=1.5,
    )  # fmt: skip


def video_vae(name: str, channels: int):
    """A VAE of frames, of factor 8."""
    return seeded(
        name, base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1] * channels, latents_std=[1.5] * channels,
    )  # fmt: skip


def _sd3_parts(**config):
    return {
        "transformer": sd3(**config), "vae": latent_vae(4), "text_encoder_3": _t5("T5EncoderModel", 32),
        "text_encoder": _clip("CLIPTextModelWithProjection", 8, 8), "tokenizer": _tokenizer(77),
        "text_encoder_2": _clip("CLIPTextModelWithProjection", 8, 8), "tokenizer_2": _tokenizer(77),
        "tokenizer_3": _tokenizer(256), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def _flux_parts(**config):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return {
        "transformer": flux(**config), "vae": latent_vae(4), "scheduler": scheduler,
        "text_encoder": _clip("CLIPTextModel", 32, 32), "tokenizer": _tokenizer(77),
        "text_encoder_2": _t5("T5EncoderModel", 32), "tokenizer_2": _tokenizer(512),
    }  # fmt: skip


def _sana_parts(**config):
    autoencoder = seeded(
        "AutoencoderDC", latent_channels=4, encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4, encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4, encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4, attention_head_dim=2, scaling_factor=0.5,
        decoder_norm_types="rms_norm", decoder_act_fns="silu", upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )  # fmt: skip
    gemma = _text_model(
        "Gemma2Model", hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0,
    )  # fmt: skip
    return {
        "transformer": sana(**config), "vae": autoencoder, "text_encoder": gemma,
        "tokenizer": _tokenizer(300), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def _qwen_parts(**config):
    import transformers

    text = {
        "vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        both = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        encoder = transformers.Qwen2_5_VLForConditionalGeneration(both).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, max_image_seq_len=8192, max_shift=0.9
    )
    return {
        "transformer": qwen(**config), "vae": video_vae("AutoencoderKLQwenImage", 4),
        "text_encoder": encoder, "tokenizer": _tokenizer(1024), "scheduler": scheduler,
    }  # fmt: skip


def _wan_parts(**config):
    return {
        "transformer": wan(**config), "vae": video_vae("AutoencoderKLWan", 4),
        "text_encoder": _t5("UMT5EncoderModel", 16), "tokenizer": _tokenizer(512),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def _dit_parts(**config):
    ours = {"num_embeds_ada_norm": 10} | config
    return {"transformer": dit(**ours), "vae": latent_vae(4), "scheduler": diffusers.DDIMScheduler()}


WHOLE = {
    "sd3": ("StableDiffusion3Pipeline", _sd3_parts), "flux": ("FluxPipeline", _flux_parts),
    "sana": ("SanaPipeline", _sana_parts), "qwen": ("QwenImagePipeline", _qwen_parts),
    "wan": ("WanPipeline", _wan_parts), "dit": ("DiTPipeline", _dit_parts),
}  # fmt: skip


def whole_pipeline(kind: str, **config):
    """A tiny pipeline with all of its parts, text encoders included; config: of its transformer."""
    name, parts = WHOLE[kind]
    return quiet(getattr(diffusers, name)(**parts(**config)))
