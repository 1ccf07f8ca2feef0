"""Tables of rows, on the terminal and in Markdown."""

from collections.abc import Callable, Sequence


def aligned(rows: list[dict], columns: Sequence[tuple[str, Callable[[dict], str]]]) -> str:
    """A table for the terminal. columns: (head, function that shows a row's cell as text)."""
    table = [[head for head, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(lines)


def markdown(table: list[list[str]]) -> str:
    """A table of Markdown from its cells, the head first."""
    head, *body = table
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join(lines) + "\n"
