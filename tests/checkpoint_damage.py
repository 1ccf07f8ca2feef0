"""Ways in which a file can be damaged."""

from pathlib import Path

DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "zero-filled": lambda content: bytes(len(content)),
    "zero-filled at its end": lambda content: content[:-500] + bytes(500),
    "another format": lambda _: b"PK\x03\x04" + bytes(3000),
}


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGES[kind](path.read_bytes()))
