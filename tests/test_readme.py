"""README, docs and CONTRIBUTING hold: commands parse or run, links lead somewhere, names and files exist."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from commands import ROOT, run
from published import SAMPLE, TRAIN

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [
    page for places in ("docs/*.md", "[a-z]*/README.md", "examples/*/README.md") for page in ROOT.glob(places)
]
PAGES.sort()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
# Options of torchrun, pip, pytest and launchers, which no parser of ours knows.
FOREIGN = {"nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port", "standalone", "local-rank"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCED.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks, a paragraph a line."""
    return re.sub(r"(?<=\S)\n(?=[^\n|#-])", " ", FENCED.sub("", page.read_text()))


def commands_of(page: Path) -> list[str]:
    """The command lines of a page: lines of its blocks, and what stands between backticks."""
    lines = [line for block in fenced(page, "", "bash") for line in block.splitlines()]
    lines += SPAN.findall(prose(page))
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun|make|pip install)\s", line)]


EVERY = sorted({(name_of(page), line) for page in PAGES for line in commands_of(page)})


def script_of(line: str) -> tuple[str, list[str]] | None:
    """The project's module that a line runs, and its arguments; None where it runs something else."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        first = next(k for k, word in enumerate(words) if word.endswith(".py"))
        assert {word[2:].partition("=")[0] for word in words[1:first] if word[:2] == "--"} <= FOREIGN, line
        words = ["python", *words[first:]]
    if words[:2] == ["python", "-m"]:
        words = ["python", *words[2:]]
    if words[0] != "python" or words[1] in ("pytest", "pip", "venv", "-c"):
        return None
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


@cache
def options_of(module: str) -> frozenset[str]:
    """All options that a command's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        parsed(module, importlib.import_module(module).parse_args, ["--help"])
    return frozenset(re.findall(r"--([a-z][\w-]*)", output.getvalue()))


def command_modules() -> list[str]:
    """All modules that are run as a command with options."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "tests")]
    found = [path for path in files if "parse_args" in (text := path.read_text()) and "__main__" in text]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


@pytest.mark.parametrize("line", sorted({line for _, line in EVERY}))
def test_commands_parse(line):
    """Every option is known, and the whole line parses where it is whole."""
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:3] == ["pip", "install", "-r"]:
        assert all((ROOT / word).is_file() for word in words[3:] if word != "-r")
    elif found := script_of(line):
        module, arguments = found
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
        if "..." in arguments:
            options = {word[2:].partition("=")[0] for word in arguments if word[:2] == "--"}
            assert options <= options_of(module)
            return
        command = importlib.import_module(module)
        if not hasattr(command, "parse_args"):
            assert not arguments
            return
        assert parsed(module, command.parse_args, arguments) in (0, None), line


def parsed(module: str, parse, arguments: list[str]) -> int | None:
    """The exit status in which parsing ends, None where it goes on."""
    with mock.patch.object(sys, "argv", [module, *arguments]):
        try:
            parse()
        except SystemExit as ended:
            return ended.code
    return None


@pytest.mark.parametrize("page", [name_of(page) for page in PAGES])
def test_options_are_known(page):
    """Whatever `--option` a page names, some command has it."""
    known = FOREIGN.union(*map(options_of, command_modules()))
    named = {
        option
        for span in SPAN.findall(prose(ROOT / page))
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)
        if not re.match(r"(pip|make|git|pytest|pre-commit|python -m pytest) ", span)
    }
    named = {option for option in named if not option.endswith("-")}
    assert named <= known, named - known


# What a page's command needs so that it takes seconds; those that are whole take nothing.
RUN = {
    "python sample.py --model DiT-digits/2 --num-sampling-steps 20 --cfg-scale 1 --accelerate-method "
    "dynamiclayer --path digits-T20-1.96x --compare": ["--repeats", "1"],
    "python router.py digits-T20-1.96x": [],
}


@pytest.mark.parametrize("line", RUN)
def test_commands_run(line, tmp_path, monkeypatch):
    assert line in {line for _, line in EVERY}, "no page has this command"
    monkeypatch.chdir(tmp_path)
    script, arguments = script_of(line)
    output = run(script, *arguments, *RUN[line])
    if script == "sample":
        assert "measured speed-up" in output
        assert "theoretical speed-up 1.96" in output
        assert (tmp_path / "sample.png").is_file()


def test_every_command_of_the_readme_is_known():
    """It runs above or in the test named beside it, or is one that needs a download or hours."""
    readme = fenced(ROOT / "README.md", "")
    [block] = [body for body in readme if "torchrun" in body]
    download, train, sample = block.splitlines()
    assert download.startswith("python download.py")
    assert train.endswith(TRAIN)  # runs in test_published_commands.py, but for its size
    assert re.sub(r"--path \S+", "--path X", sample) == "python " + re.sub(r"--path \S+", "--path X", SAMPLE)
    lines = {line for page, line in EVERY if page == "README.md"} - {
        download.partition("  ")[0],
        train,
        sample,
    }
    apart = ("make ", "pip install -r ", "python train_router.py ...")
    apart += ("python demo.py", "python -m study.run")  # test_demo.py, test_study.py
    assert {line for line in lines if not line.startswith(apart)} <= RUN.keys()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_lists_its_targets_and_the_demo_begins_with_what_it_does():
    make = ["make", "--no-print-directory"]  # a make that runs this test passes its own flags on
    listed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "study", "test", "clean"):
        assert re.search(rf"^  {target} +\S", listed, re.MULTILINE)
    first = subprocess.run(
        [*make, "-n", "demo", "VENV=does/not/exist"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert first.startswith("echo 'The demo trains")
    assert "minutes" in first[: first.index("pip ")]


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (name_of(page), code)
        for page in PAGES
        if page.parent.parent.name != "examples" and page.name != "diffusers.md"  # which has its own test
        for code in fenced(page, "python")
    ],
)
def test_python_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)", FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
    return set(plain)


@pytest.mark.parametrize("page", [name_of(page) for page in PAGES])
def test_links_lead_somewhere(page):
    page = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\n", "", FENCED.sub("", page.read_text()))):
        if re.match(r"https?://", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("page", [name_of(page) for page in PAGES])
def test_files_and_names_exist(page):
    """`folder/file.py` from the root or in the page's folder, `module.name` as Python finds it."""
    page = ROOT / page
    for span in SPAN.findall(prose(page)):
        if "NAME" in span or span == "__init__.py":
            continue
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(\.(py|md|sh|toml|yml|cff)|/)", span) or re.fullmatch(
            r"(study|benchmarks|docs|tests|examples)/[\w./-]+", span
        ):
            if not span.startswith(("results/", "scratch/", "Path/")):  # what commands write
                near = page.parent != ROOT and any(page.parent.rglob(span.rstrip("/")))
                assert (ROOT / span).exists() or (page.parent / span).exists() or near, span
        elif (
            re.fullmatch(r"\w+(\.\w+)+", span)
            and not re.search(r"\.(png|npz|pt|jsonl?)$", span)
            and span.partition(".")[0] in ROOMS
        ):
            assert resolves(span), span


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:k])
        if place.is_dir() or place.with_suffix(".py").is_file():
            found = importlib.import_module(".".join(parts[:k]))
            for part in parts[k:]:
                if not hasattr(found, part):
                    return part in getattr(found, "__annotations__", {})
                found = getattr(found, part)
            return True
    return False


def test_tree_names_what_there_is():
    [tree] = [body for body in fenced(ROOT / "README.md", "") if "objectives.py  " in body]
    named = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).exists() for name in named)
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= {name.rstrip("/") for name in named}
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)


def test_pages_that_code_names_exist():
    for path in [*ROOT.rglob("*.py"), *ROOT.glob("*/*.sh")]:
        if path.relative_to(ROOT).parts[0].startswith("."):
            continue
        for name in re.findall(r"\bdocs/[\w-]+\.md", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"
