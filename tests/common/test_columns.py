"""Tables as text."""

from common.columns import aligned, markdown

ROWS = [{"name": "none", "ms": 12.25}, {"name": "fora:2", "ms": 7.0}]
COLUMNS = (("method", lambda row: row["name"]), ("ms", lambda row: f"{row['ms']:.2f}"))


def test_columns_are_aligned_to_the_right():
    assert aligned(ROWS, COLUMNS) == "method     ms\n  none  12.25\nfora:2   7.00"


def test_a_head_alone():
    assert aligned([], COLUMNS) == "method  ms"


def test_markdown():
    text = markdown([["method", "ms"], ["none", "12.2"]])
    assert text == "| method | ms |\n| --- | --- |\n| none | 12.2 |\n"
