"""The charts of a study: trade-offs, schedules, lambda, curves, images; on a light and on a dark ground."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from common.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart, on both grounds.
COLOURS = {
    "fewer-steps": "#999999", "fora": "#0072B2", "taylor-fora": "#56B4E9", "taylor2-fora": "#7B8CDE",
    "random": "#B08D57", "l2c": "#009E73", "l2c-every-row": "#66C2A5", "harmonica": "#D55E00",
    "harmonica-paper": "#E69F00", "taylor-harmonica": "#CC79A7", "calibrated-fora": "#1B6F8A",
    "calibrated-harmonica": "#A65628", "end-to-end": "#8E5AC8", "end-to-end+forecast": "#D6006C",
    "fora-released": "#4C9FD0", "taylor-fora-released": "#9BD3F2", "taylor2-fora-released": "#A9B5EC",
}  # fmt: skip
MARKERS = "osD^v<>PXphdH*8+x"
THEMES = {
    "light": {
        "figure.facecolor": "#ffffff",
        "axes.facecolor": "#ffffff",
        "text": "#1f2328",
        "grid": "#d8dee4",
    },
    "dark": {
        "figure.facecolor": "#0d1117",
        "axes.facecolor": "#0d1117",
        "text": "#e6edf3",
        "grid": "#30363d",
    },
}


def render(draw: Callable[[Figure, dict], None], size: tuple[float, float], theme: str) -> bytes:
    """A chart as PNG. draw(figure, colours) fills the figure; size in inches, at 110 dots per inch."""
    colours = THEMES[theme]
    text, ground = colours["text"], colours["axes.facecolor"]
    settings = {"figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    settings |= {"axes.edgecolor": colours["grid"], "grid.color": colours["grid"], "font.size": 10}
    settings |= {"legend.facecolor": ground, "legend.edgecolor": colours["grid"], "legend.fontsize": 8}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, colours)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def trade_off(groups: list[dict], x: str, y: str, labels: tuple[str, str]) -> Callable:
    """A line for each method through its speeds: the mean over seeds, bars from the least to the greatest."""

    def draw(figure: Figure, _theme: dict) -> None:
        axes = figure.add_subplot()
        methods = list(dict.fromkeys(group["method"] for group in groups))
        for method in methods:
            points = [group for group in groups if group["method"] == method]
            points.sort(key=lambda point: point["mean"][x])
            means = np.array([[p["mean"][x], p["mean"][y]] for p in points])
            low, high = (np.array([p[end][y] for p in points]) for end in ("least", "greatest"))
            marker = MARKERS[list(COLOURS).index(method) % len(MARKERS)] if method in COLOURS else "."
            spread = np.maximum(0, [means[:, 1] - low, high - means[:, 1]])  # equal seeds round below zero
            axes.errorbar(
                *means.T, yerr=spread, label=method, marker=marker,
                color=COLOURS.get(method), linewidth=1.3, markersize=5, capsize=2,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(True, linewidth=0.6)
        axes.legend(ncols=2)

    return draw


def schedules(tables: list[tuple[str, np.ndarray]]) -> Callable:
    """Bool tables (T, B) side by side: steps downwards in the order of execution, computed cells filled."""

    def draw(figure: Figure, theme: dict) -> None:
        columns = min(3, len(tables))
        cmap = matplotlib.colors.ListedColormap([theme["grid"], "#0072B2"])
        for i, (title, table) in enumerate(tables):
            axes = figure.add_subplot(-(-len(tables) // columns), columns, i + 1)
            axes.imshow(table[::-1], aspect="auto", cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
            num_steps = len(table)
            ticks = range(0, num_steps, max(1, num_steps // 5))
            axes.set_yticks(ticks, [str(num_steps - 1 - tick) for tick in ticks])
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("branch", fontsize=8)
            axes.set_ylabel("step", fontsize=8)

    return draw


def lines(series: list[tuple[str, np.ndarray, np.ndarray]], labels: tuple[str, str], log: bool) -> Callable:
    """A line for each (name, x, y)."""

    def draw(figure: Figure, _theme: dict) -> None:
        axes = figure.add_subplot()
        for name, x, y in series:
            axes.plot(x, y, label=name, color=COLOURS.get(name), linewidth=1.4)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(True, linewidth=0.6)
        axes.legend()

    return draw


def image_rows(rows: list[tuple[str, np.ndarray]]) -> Callable:
    """A row of images (n, H, W), or (n, H, W, 3) in colour, and beside it the difference to the first row."""

    def strip(images: np.ndarray, fill: float) -> np.ndarray:
        padding = [(0, 0), (0, 0), (0, 1), (0, 0)][: images.ndim]
        return np.concatenate(list(np.pad(images, padding, constant_values=fill)), axis=1)

    def draw(figure: Figure, _theme: dict) -> None:
        axes = figure.subplots(len(rows), 2, squeeze=False)
        for (left, right), (name, images) in zip(axes, rows, strict=True):
            difference = images.astype(float) - rows[0][1]
            if difference.ndim == 4:
                difference = difference.mean(-1)
            left.imshow(strip(images, 255), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            right.imshow(strip(difference, 0), cmap="RdBu", vmin=-96, vmax=96, interpolation="nearest")
            left.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            for one in (left, right):
                one.set_xticks([])
                one.set_yticks([])
        axes[0][0].set_title("samples of the same noise", fontsize=9)
        axes[0][1].set_title("difference to uncached (blue: brighter)", fontsize=9)

    return draw


def save(folder: Path, name: str, draw: Callable, size: tuple[float, float]) -> dict[str, str]:
    """Write FOLDER/NAME.png on a light ground; returns both grounds as data URIs."""
    images = {theme: render(draw, size, theme) for theme in THEMES}
    with replacing(folder / f"{name}.png") as temporary:
        temporary.write_bytes(images["light"])
    return {theme: data_uri(png) for theme, png in images.items()}
