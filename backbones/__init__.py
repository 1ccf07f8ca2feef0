"""Frozen denoising models: their contract, our DiT's loading and checkpoints, hooks on diffusers' models."""

from typing import TYPE_CHECKING

from backbones.contract import Backbone as Backbone

if TYPE_CHECKING:
    from backbones.hooks import apply_schedule, remove_schedule, scheduled, summary

__all__ = ["Backbone", "apply_schedule", "remove_schedule", "scheduled", "summary"]


def __getattr__(name: str):
    """The functions of `backbones.hooks`, imported when one is asked for: diffusers is slow to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from backbones import hooks

    return getattr(hooks, name)
