"""Charts: what is drawn, on a light and a dark ground."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from study import charts


def draw(function) -> Figure:
    figure = Figure()
    function(figure, charts.THEMES["light"])
    return figure


def group(method: str, speed: float, mse: float, spread: float = 0) -> dict:
    figures = {"speedup_macs": speed, "mse": mse}
    ends = {"least": figures | {"mse": mse - spread}, "greatest": figures | {"mse": mse + 2 * spread}}
    return {"method": method, "mean": figures} | ends


def test_trade_off_has_a_line_a_method_through_its_speeds_in_order():
    groups = [
        group("fora", 3, 0.3),
        group("fora", 2, 0.1),
        group("harmonica", 2, 0.2, 0.1),
        group("new", 2, 1),
    ]
    [axes] = draw(charts.trade_off(groups, "speedup_macs", "mse", ("speed", "error"))).axes
    lines = {one.get_label(): one[0].get_xydata().tolist() for one in axes.containers}
    assert lines == {"fora": [[2, 0.1], [3, 0.3]], "harmonica": [[2, 0.2]], "new": [[2, 1]]}
    bar = axes.containers[1][2][0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([0.1, 0.4])
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("speed", "error")


def test_schedule_runs_downwards_as_executed_and_is_filled_where_computed():
    table = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 1]], dtype=bool)
    [axes] = draw(charts.schedules([("mine", table)])).axes
    image = axes.images[0].get_array()
    assert (np.asarray(image) == table[::-1]).all()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2", "1", "0"]
    light, blue = axes.images[0].cmap(0.0), axes.images[0].cmap(1.0)
    assert sum(light[:3]) > sum(blue[:3])


def test_lines_and_images():
    [axes] = draw(charts.lines([("a", np.arange(3), np.array([1, 10, 100]))], ("x", "y"), log=True)).axes
    assert axes.get_yscale() == "log"
    images = np.zeros((2, 8, 8), dtype=np.uint8)
    figure = draw(charts.image_rows([("uncached", images), ("cached", images + 7)]))
    left, right = figure.axes[2:4]
    assert left.images[0].get_array()[0, 0] == 7
    assert right.images[0].get_array()[0, 0] == 7  # the difference to the first row
    assert figure.axes[1].images[0].get_array().max() == 0
    assert left.images[0].get_array().shape == (8, 2 * 9)


def test_pictures_on_both_grounds(tmp_path):
    function = charts.lines([("a", np.arange(3), np.arange(3))], ("x", "y"), log=False)
    found = charts.save(tmp_path, "one", function, (2, 1))
    assert found.keys() == {"light", "dark"}
    assert found["light"] == charts.data_uri((tmp_path / "one.png").read_bytes())
    corners = {}
    for theme in charts.THEMES:
        with Image.open(io.BytesIO(charts.render(function, (2, 1), theme))) as picture:
            assert picture.size == (220, 110)
            corners[theme] = picture.convert("RGB").getpixel((0, 0))
    assert corners == {"light": (255, 255, 255), "dark": (0x0D, 0x11, 0x17)}


def test_every_method_has_a_colour_and_a_marker_of_its_own():
    assert len(set(charts.COLOURS.values())) == len(charts.COLOURS)
    assert len(charts.MARKERS) >= len(charts.COLOURS)
