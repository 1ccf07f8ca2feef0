import numpy as np
import torch

from common.pictures import comparison, schedule_heat_map, sheet


def test_sheet_places_images_row_by_row_and_enlarges_small_ones():
    images = torch.arange(5, dtype=torch.uint8).mul(50)[:, None, None, None].expand(5, 8, 8, 1)
    pixels = np.asarray(sheet(images, columns=3))
    assert pixels.shape == (2 * 64 + 2, 3 * 64 + 2 * 2, 3)
    assert [int(pixels[10, 10 + 66 * i, 0]) for i in range(3)] == [0, 50, 100]
    assert [int(pixels[76, 10 + 66 * i, 0]) for i in range(3)] == [150, 200, 255]  # the last place is empty


def test_comparison_stacks_captioned_sheets():
    black, grey = (
        torch.zeros(2, 64, 64, 3, dtype=torch.uint8),
        torch.full((2, 64, 64, 3), 99, dtype=torch.uint8),
    )
    pixels = np.asarray(comparison([("uncached", black), ("cached", grey)]))
    column = pixels[:, 40, 0]
    assert np.flatnonzero(column == 0).min() < np.flatnonzero(column == 99).min()


def test_heat_map_runs_downwards_and_dots_reused_cells():
    """Two steps of two branches: the first step (row 1) on top, all computed; below, branch 1 reused."""
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    pixels = np.asarray(schedule_heat_map(scores, 0.1, ("0.attn", "0.mlp"))).astype(int)
    yellow = np.argwhere((pixels[..., 0] > 240) & (pixels[..., 1] > 220) & (pixels[..., 2] < 60))
    violet = np.argwhere((abs(pixels - np.array([68, 1, 84])) < 6).all(-1))
    violet = violet[violet[:, 1] < pixels.shape[1] * 0.75]  # not the colour bar
    assert yellow[:, 0].min() < violet[:, 0].min()  # the computed row is above
    assert (
        violet[:, 1].mean() > yellow[yellow[:, 1] < pixels.shape[1] * 0.75][:, 1].mean()
    )  # the right branch
    top, bottom = violet.min(0), violet.max(0)
    inside = pixels[top[0] : bottom[0], top[1] : bottom[1]]
    assert (inside.min(-1) > 240).any()  # the dot
