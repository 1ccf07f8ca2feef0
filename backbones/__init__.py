"""Frozen denoising models: their contract, our DiT's loading and checkpoints, one denoising step of any."""

from backbones.contract import Backbone as Backbone
