"""What `torch.hub.load` gives of this repository, from the local folder."""

import torch
from commands import ROOT
from tiny_transformers import pixart

from backbones import remove_schedule
from backbones.families import find_branches
from models import DiT
from router import Schedule


def load(*arguments, **options):
    return torch.hub.load(str(ROOT), *arguments, source="local", **options)


def test_models_and_routers():
    assert isinstance(load("dit", "DiT-digits/2"), DiT)
    assert load("router", "digits-T20-1.96x").num_steps == 20


def test_schedules():
    transformer = pixart()
    everything = Schedule(torch.ones(4, len(find_branches(transformer)), dtype=torch.bool))
    session = load("apply_schedule", transformer, everything)
    assert session.schedule.cur == 0
    remove_schedule(transformer)
