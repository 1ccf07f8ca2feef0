from pathlib import Path

import pytest
import torch

from backbones.pixart import random_pixart
from benchmarks.cache_memory import measured, stored_bytes, table
from common.columns import markdown
from schedules.baselines import fora_schedule
from schedules.forecasts import taylor as forecasting


def tiny():
    return random_pixart(
        "PixArt-Sigma-256", num_layers=2, sample_size=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_what_is_stored_is_what_the_formula_says(rows, dtype):
    transformer = tiny().to(dtype)
    found = measured("PixArt-Sigma-256", transformer, rows)
    assert found["stored_bytes"] == found["stored_bytes_by_formula"] == 6 * rows * 16 * 16 * dtype.itemsize
    assert (found["computed"], found["reused"], found["tokens"]) == (6, 6, 16)
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    assert not any("_diffusers_hook" in vars(module) for module in transformer.modules())


def test_forecasts_take_more():
    schedule = fora_schedule(6, 6, 2)
    plain, second = (
        stored_bytes(tiny(), one, 1, torch.float32) for one in (schedule, forecasting(schedule, 2))
    )
    assert second == 3 * plain


def test_the_page_has_the_table_that_the_command_prints():
    page = Path(__file__).parents[2] / "docs" / "diffusers.md"
    assert markdown(table(rows=2)) in page.read_text()
