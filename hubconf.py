"""For `torch.hub.load("OWNER/REPO", NAME)`: models, routers and schedules without an install.

import torch
model = torch.hub.load("OWNER/REPO", "dit", "DiT-XL/2", ckpt="DiT-XL-2-256x256.pt")
router = torch.hub.load("OWNER/REPO", "router", "USER/ROUTER")
torch.hub.load("OWNER/REPO", "apply_schedule", pipe, "USER/ROUTER")
"""

dependencies = ["torch", "numpy", "timm", "safetensors", "tqdm", "PIL"]


def dit(name: str = "DiT-XL/2", **options):
    """A frozen DiT by name, ready to sample. options: those of `backbones.loading.load_model`."""
    from backbones.loading import load_model

    return load_model(name, **options)


def router(path: str):
    """A `router.Router`: from a file, the name of one that ships, or a repository of the Hub."""
    from router import load_router

    return load_router(path)


def apply_schedule(pipeline, schedule_or_router, threshold=None, cache_dtype=None):
    """`backbones.apply_schedule` on a pipeline of diffusers or a transformer."""
    from backbones import apply_schedule as apply

    return apply(pipeline, schedule_or_router, threshold, cache_dtype)
