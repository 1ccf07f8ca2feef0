"""Pictures: image sheets, uncached-above-cached comparisons, and schedules as heat maps."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """uint8 images (n, H, W, 1 or 3) side by side, `columns` a row; small ones enlarged by whole pixels."""
    array = images.numpy()
    factor = max(1, 64 // array.shape[1])
    array = array.repeat(factor, axis=1).repeat(factor, axis=2)
    array = np.broadcast_to(array, (*array.shape[:3], 3))
    n, height, width, _ = array.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = 2
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(array):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def comparison(parts: list[tuple[str, Tensor]], columns: int = 8) -> Image.Image:
    """Captioned sheets one above the other: [("uncached ...", images), ("cached ...", images)]."""
    sheets = [(caption, sheet(images, columns)) for caption, images in parts]
    width = max(picture.width for _, picture in sheets)
    font = ImageFont.load_default(14)
    lines = [textwrap.wrap(caption, max(20, width // 8)) for caption, _ in sheets]
    heights = [picture.height + 20 * len(text) + 14 for (_, picture), text in zip(sheets, lines, strict=True)]
    canvas = Image.new("RGB", (width + 16, sum(heights) + 8), "white")
    draw, top = ImageDraw.Draw(canvas), 6
    for (_, picture), text, height in zip(sheets, lines, heights, strict=True):
        for row, line in enumerate(text):
            draw.text((8, top + 20 * row), line, fill="black", font=font)
        canvas.paste(picture, (8, top + 20 * len(text) + 2))
        top += height
    return canvas


def schedule_heat_map(
    scores: Tensor, threshold: float, branches: tuple[str, ...], title: str = ""
) -> Image.Image:
    """Scores (T, B) as colour, steps down as they are executed, branches across; a dot on reused cells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and sheets need none of it
    from matplotlib.figure import Figure

    table = scores.detach().cpu().numpy()[::-1]
    num_steps, num_branches = table.shape
    figure = Figure(figsize=(max(6.0, 0.16 * num_branches + 2), max(3.0, 0.16 * num_steps + 1.6)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    rows, columns = np.nonzero(table <= threshold)
    axes.scatter(columns, rows, s=4, c="white", linewidths=0)
    axes.set_xlabel(
        f"branch, {num_branches} in order of execution (" + ", ".join(branch_types(branches)) + " per block)"
    )
    axes.set_ylabel("step, executed downwards")
    every = max(1, num_steps // 10)
    axes.set_yticks(range(0, num_steps, every), [str(num_steps - 1 - i) for i in range(0, num_steps, every)])
    axes.set_title(f"{title}\nwhite dot: reused (score at most {threshold:g})", fontsize=9)
    figure.colorbar(shown, label="score (1 compute, 0 reuse)")
    figure.tight_layout()
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def branch_types(branches: tuple[str, ...]) -> list[str]:
    """The distinct kinds, the last parts of the names, in order: attn, mlp of `"0.attn", "0.mlp"`."""
    return list(dict.fromkeys(name.rpartition(".")[-1] for name in branches))
