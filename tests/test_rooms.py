"""The structure: imports go one way, without a circle, and the library names no example."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a module may import from its own level and from those below.
LEVELS = (
    ("common",),
    ("metrics", "diffusion", "cache", "router"),
    ("backbones", "models", "objectives"),
    ("sampling", "schedules", "execution"),
    ("examples",),
    ("training", "end_to_end", "benchmarks"),
    ("study",),
)
COMMANDS = len(LEVELS)
MAY_NAME_EXAMPLES = ("examples", "study", "demo", "tests")


def python_files() -> dict[str, Path]:
    """The project's modules by their dotted name, tests apart."""
    files = (path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith("."))
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {
        name.removesuffix(".__init__"): path
        for path, name in names.items()
        if not name.startswith(("tests.", "results."))
    }


def imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{one.name}" for one in node.names}
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return found & modules.keys()


MODULES = python_files()
IMPORTS = {name: imports_of(path, MODULES) - {name} for name, path in MODULES.items()}


def level(module: str) -> int:
    room = module.partition(".")[0]
    return next((k for k, rooms in enumerate(LEVELS) if room in rooms), COMMANDS)


def test_every_room_is_known():
    rooms = {name.partition(".")[0] for name in MODULES if MODULES[name].parent != ROOT}
    assert rooms == {room for rooms in LEVELS for room in rooms} - {"cache", "router", "models", "objectives"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    above = {other for other in IMPORTS[module] if level(other) > level(module)}
    assert not above, f"{module} imports {above} from above it"
    if level(module) == COMMANDS:
        commands = {other for other in IMPORTS[module] if level(other) == COMMANDS}
        assert not commands, f"{module} imports the command {commands}"


def test_there_is_no_circle():
    finished, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        path.append(module)
        for other in sorted(IMPORTS[module]):
            visit(other)
        finished.add(path.pop())

    for module in sorted(MODULES):
        visit(module)


def test_rooms_of_one_level_do_not_import_each_other_in_a_circle():
    """But for the four files on top, which belong to their level's rooms."""
    on_top = {name for name, path in MODULES.items() if path.parent == ROOT}
    pairs = {
        (one.partition(".")[0], other.partition(".")[0])
        for one, others in IMPORTS.items()
        for other in others
        if not {one, other} & on_top
    }
    circles = {pair for pair in pairs if pair[0] != pair[1] and pair[::-1] in pairs}
    assert not circles


def test_the_library_names_no_example():
    names = {path.parent.name for path in ROOT.glob("examples/*/__init__.py")}
    assert names, "there are no examples"
    for module, path in MODULES.items():
        if not module.startswith(MAY_NAME_EXAMPLES):
            found = re.findall(rf"(?i){'|'.join(names)}", path.read_text())
            assert not found, f"{path} names {found}"


@pytest.mark.parametrize(
    "room", sorted({name for name in MODULES if "." not in name and (ROOT / name).is_dir()})
)
def test_a_room_says_its_job_in_one_line(room):
    doc = ast.get_docstring(ast.parse(MODULES[room].read_text()))
    assert doc, room
    assert doc.partition("\n")[0].endswith((".", ":")), doc
