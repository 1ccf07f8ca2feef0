"""Tables of rows, on the terminal and in Markdown."""


def print_columns(rows: list[dict], columns: tuple) -> None:
    """A table on the terminal; columns: (head, what shows a row's cell as text)."""
    table = [[head for head, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def markdown(table: list[list[str]]) -> str:
    head, *body = table
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join(lines) + "\n"
