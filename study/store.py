"""What a study keeps in its folder, a file a kind, and what of its plan is done.

| file | holds |
|---|---|
| `rows.jsonl` | a line a measured row: its figures, its command, the first samples as a picture |
| `routers.safetensors` | all trained routers by name, see `router.save_routers` |
| `latency.jsonl` | a line a row of the comparison: its latency |
| `curves.jsonl` | a line a training that the report draws: what it logged |
| `study.json`, `table.md` | made of these by `study.run`: the rows with their latencies, and as tables |
| `scratch/` | what can be deleted: the trainings' folders, uncached samples, the tasks' output |
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from common.files import append_line, replacing, to_json, writing
from common.identity import same_weights
from router import Router, load_routers, save_routers
from study.plan import ROUTERS, Task


class Records:
    """A file of JSON objects, one a line, each with an `id`; of several of one id the last one counts."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict]:
        """All records by id. Raises ValueError, naming the line, where one does not read.

        Half of a last line is what a killed writer left; it is passed over.
        """
        if not self.path.is_file():
            return {}
        found, lines = {}, self.path.read_text().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            record = parsed(line)
            if record is not None:
                found[record["id"]] = record
            elif line.endswith("\n"):
                raise ValueError(f"{self.path}, line {number} is no JSON object with an id")
        return found

    def add(self, record: dict) -> None:
        """Append one record. Half of a last line is removed first."""
        line = to_json(record)
        if self.path.is_file():
            last = self.path.read_bytes().rpartition(b"\n")[2]
            if parsed(last) is not None:
                line = f"\n{line}"  # an editor took the newline away
            elif last:
                os.truncate(self.path, self.path.stat().st_size - len(last))
        append_line(self.path, line)

    def tidy(self, order: Iterable[str]) -> None:
        """Write the file anew with one line an id, in this order; ids that are not in it come last."""
        found = self.read()
        ids = [id for id in order if id in found]
        ids += sorted(found.keys() - set(ids))
        with replacing(self.path) as temporary:
            temporary.write_text("".join(f"{to_json(found[id])}\n" for id in ids))


def parsed(line: str | bytes) -> dict | None:
    """A line as a record, or None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "id" in record else None


class Study:
    """A study's folder. Reading needs nothing; whoever adds to it holds `writing()`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows, self.latencies, self.curves = (
            Records(folder / f"{name}.jsonl") for name in ("rows", "latency", "curves")
        )

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @cached_property
    def routers(self) -> dict[str, Router]:
        file = self.folder / ROUTERS
        return load_routers(file) if file.is_file() else {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only process that adds to the study. Raises OSError, naming the holder, where another is."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        with writing(self.folder):
            yield

    def add_router(self, task: Task, router: Router) -> None:
        """Keep a training's router with the arguments that it was trained with."""
        router.info = router.info | {"train_arguments": task.arguments}
        self.routers[task.id] = router
        save_routers(self.folder / ROUTERS, self.routers)

    def router_hash(self, task: Task) -> str | None:
        """Of the router that a row measures: a router that was trained anew is measured anew."""
        training = task.row.training
        router = self.routers.get(training.id) if training else None
        return router_hash(router) if router else None

    def is_done(self, task: Task, rows: dict[str, dict], weights: str) -> bool:
        """Whether a task's result is there: of these settings, this router and these weights of the model.

        rows: the study's. weights: the model's fingerprint.
        """
        if task.is_training:
            info = self.routers[task.id].info if task.id in self.routers else {}
            same = info.get("train_arguments") == task.arguments
            return same and same_weights(info["settings"]["weights"], weights)
        found = rows.get(task.id)
        return (
            found is not None
            and (found["command"], found["router_hash"]) == (task.command, self.router_hash(task))
            and same_weights(found["weights"], weights)
        )

    def done(self, tasks: list[Task], weights: str) -> set[str]:
        """The ids of the tasks whose results are there."""
        rows = self.rows.read()
        return {task.id for task in tasks if self.is_done(task, rows, weights)}


def router_hash(router: Router) -> str:
    """16 hexadecimal digits of what decides a router's schedule and reuse: logits, weights, threshold."""
    digest = hashlib.sha256(f"{tuple(router.logits.shape)} {router.info.get('threshold')}".encode())
    for table in (router.logits.detach(), router.weights, *router.tensors.values()):
        if table is not None:
            digest.update(table.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
