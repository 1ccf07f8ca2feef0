"""Routers, schedules, and their files.

A router holds one logit per (step, branch); its sigmoid is the score in (0, 1), 1 = compute, 0 = reuse. A
threshold turns the scores into a `Schedule`, the bool table that sampling, benchmarks and reports use. Row
T-1 is the first step executed, the noisiest: nothing is stored before it, so it always computes.

    python router.py FILE                     # what a router file holds
    python router.py FILE --export OTHER.pt   # the same router in the released HarmoniCa layout
    python router.py push FILE USER/REPO      # share it on the Hub, with a page made of its facts

A file can hold many routers by name (`save_routers`); FILE.safetensors:NAME is one of them, wherever a router
is asked for.
"""

import argparse
import contextlib
import difflib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import cards, cli, hub, registry
from common.contents import is_pickle, is_safetensors
from common.files import load_pickle_safely, make_folder, replacing
from common.pictures import schedule_heat_map
from common.weights import DTYPES, unwrapped

FORMAT_VERSION = 1
MAX_TERMS = 3  # most outputs that a reused branch may combine, as in TaylorSeer's second order
LOGIT_LIMIT = 5.0
DEFAULT_THRESHOLD = 0.1  # HarmoniCa's, where a file says none
# What a router for every speed-up holds in addition, see `schedules/any_speed.py`.
ANY_SPEED_TENSORS = ("order", "gram", "moves")
ANY_SPEED_FACTS = ("speedups", "branch_macs", "other_macs", "branch_size")
_TENSORS = ("logits", "weights", *ANY_SPEED_TENSORS)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which branch is computed at which step, and what takes the place of an output that is not.

    compute: bool (T, B) on the host, True = compute, False = reuse. Row T-1 is set to True: there is nothing
    to reuse yet. source: where it came from, for people. weights: (T, B, K) on the host, None = reuse the
    last computed output as it is; else a reused cell's output is `sum_k weights[step, branch, k] * output_k`,
    output_0 the last computed one, output_1 the one before, as many as there are. In the terms of a forecast
    `alpha * last + gamma * (last - previous)`: weights alpha + gamma and -gamma.
    """

    compute: Tensor
    source: str = ""
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.compute.dtype != torch.bool or self.compute.ndim != 2 or not self.compute.numel():
            raise ValueError(
                f"a schedule is a bool table (steps, branches), not {self.compute.dtype} of shape "
                f"{tuple(self.compute.shape)}"
            )
        table = self.compute.detach().cpu().clone()
        table[-1] = True
        object.__setattr__(self, "compute", table)
        if self.weights is not None:
            if self.weights.ndim != 3 or self.weights.shape[:2] != table.shape or not self.weights.numel():
                raise ValueError(
                    f"weights of shape {tuple(self.weights.shape)} do not fit a schedule of "
                    f"{tuple(table.shape)}; they are (steps, branches, terms)"
                )
            object.__setattr__(self, "weights", self.weights.detach().cpu().float().clone())

    @property
    def num_steps(self) -> int:
        return self.compute.shape[0]

    @property
    def num_branches(self) -> int:
        return self.compute.shape[1]

    @property
    def cur(self) -> float:
        """Cache utilization ratio: reused cells over all cells, the first step included."""
        return 1.0 - self.compute.sum().item() / self.compute.numel()

    def computed(self) -> Tensor:
        """(T, B) share of the samples that compute each cell, float64: 0 or 1."""
        return self.compute.double()

    @property
    def num_terms(self) -> int:
        """K, how many outputs a reused cell combines at most."""
        return 1 if self.weights is None else self.weights.shape[2]

    def terms_used(self) -> Tensor:
        """(T, B) products per value that a reused cell costs: one per weight, none for a plain copy."""
        if self.weights is None:
            return torch.zeros(self.compute.shape, dtype=torch.long)
        used = weights_read(self.compute, self.num_terms) & (self.weights != 0)
        copied = (used.sum(-1) == 1) & used[..., 0] & (self.weights[..., 0] == 1)
        return torch.where(copied, 0, used.sum(-1))

    def outputs_read(self) -> Tensor:
        """(T, B) how many of a branch's last outputs must be stored for a cell; 0 where it is computed."""
        reads = weights_read(self.compute, self.num_terms)  # (T, B, K), by the outputs stored before a step
        if self.weights is not None:
            reads &= self.weights != 0
        reads[..., 0] |= ~self.compute  # reuse takes the last output, whatever its weight
        return (reads * torch.arange(1, self.num_terms + 1)).amax(-1)

    def kept(self) -> Tensor:
        """(T, B) how many of its last outputs a branch keeps after a step: as many as later steps read."""
        oldest = self.outputs_read()
        kept = torch.zeros(self.compute.shape, dtype=torch.long)
        for step in range(1, self.num_steps):  # from the last step executed, 0, back to the first
            after = step - 1  # the step that is executed after this one
            needed = torch.where(self.compute[after], kept[after] - 1, kept[after])  # without its own output
            kept[step] = torch.maximum(needed, oldest[after])
        return kept

    def stored_outputs(self) -> int:
        """The most branch outputs that the cache holds at once; each has `branch_size` values per sample."""
        held, most = [0] * self.num_branches, 0
        for row in reversed(self.kept().tolist()):  # the steps in order of execution
            for branch, count in enumerate(row):
                held[branch] = count
                most = max(most, sum(held))
        return most

    def macs(self, model) -> int:
        """MACs of one sample's whole trajectory without guidance (twice that with it)."""
        computed = self.compute.long() @ torch.tensor(model.branch_macs)  # (T,)
        combined = int(self.terms_used().sum()) * model.branch_size
        return int(computed.sum()) + combined + self.num_steps * model.other_macs

    def speedup_macs(self, model) -> float:
        """MACs of the uncached trajectory over this one's: the theoretical speed-up."""
        return self.num_steps * (sum(model.branch_macs) + model.other_macs) / self.macs(model)


def weights_read(compute: Tensor, num_terms: int) -> Tensor:
    """Bool (T, B, K): the weights that sampling reads, those of reused cells for outputs that are stored."""
    computed_so_far = compute.flip(0).long().cumsum(0).flip(0)
    return (torch.arange(num_terms) < computed_so_far[..., None]) & ~compute[..., None]


class Router(nn.Module):
    """Learnable logits (T, B), one parameter per row: a step updates its row's optimizer state alone.

    Rows 0 .. T-2 are parameters, drawn from a standard normal; row T-1 is a buffer at logit 5. `info` holds
    what a file says of the router (method, model, num_steps, threshold, ...). `weights` (T, B, K), None for
    plain reuse, are those of its schedules. `tensors`, where it has some, make it a router for every speed-up
    (`schedules/any_speed.py`); it has no schedule of a threshold.
    """

    def __init__(self, num_steps: int, num_branches: int, generator: torch.Generator | None = None):
        super().__init__()
        if num_steps < 2:
            raise ValueError(
                f"a router needs at least 2 steps, not {num_steps}: the first one is never cached"
            )
        rows = torch.randn(num_steps - 1, num_branches, generator=generator)
        self.rows = nn.ParameterList(row.clone() for row in rows)
        self.register_buffer("first_row", torch.full((num_branches,), LOGIT_LIMIT))
        self.info: dict = {}
        self.weights: Tensor | None = None
        self.tensors: dict[str, Tensor] = {}

    @classmethod
    def from_schedule(cls, schedule: Schedule) -> "Router":
        """A router whose logits, all at their limits, mean this schedule at every usual threshold."""
        router = cls.from_logits(torch.where(schedule.compute, LOGIT_LIMIT, -LOGIT_LIMIT))
        router.weights = schedule.weights
        return router

    @classmethod
    def from_logits(cls, logits: Tensor) -> "Router":
        """A router with these logits (T, B), the never-trained row T-1 included."""
        router = cls(*logits.shape)
        router.set_logits(logits)
        return router

    def set_logits(self, logits: Tensor) -> None:
        with torch.no_grad():
            for row, values in zip([*self.rows, self.first_row], logits, strict=True):
                row.copy_(values)

    @property
    def num_steps(self) -> int:
        return len(self.rows) + 1

    @property
    def num_branches(self) -> int:
        return len(self.first_row)

    @property
    def logits(self) -> Tensor:
        return torch.stack([*self.rows, self.first_row])

    def scores(self) -> Tensor:
        """(T, B) in (0, 1)."""
        return torch.sigmoid(self.logits)

    def score_rows(self) -> list[Tensor]:
        """The same as T separate rows (B,): the gradient of one never reaches another's parameter."""
        return [torch.sigmoid(row) for row in [*self.rows, self.first_row]]

    @torch.no_grad()
    def clamp_(self, step: int) -> None:
        self.rows[step].clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)

    def schedule(self, threshold: float) -> Schedule:
        """Compute a cell iff its score > threshold. Raises ValueError outside [0, 1)."""
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold {threshold} is outside [0, 1); the published one is 0.1")
        if self.tensors:
            least, *_, most = self.info["speedups"]
            raise ValueError(
                f"{self.info.get('path', 'this router')} is for every speed-up from {least:g} to {most:g} by "
                f"MACs; give the one you want, such as --speedup {min(2, most):g}"
            )
        method = self.info.get("method", "router")
        return Schedule(
            self.scores().detach() > threshold, f"{method}, threshold {threshold:g}", self.weights
        )


def save_router(path: str | Path, router: Router, tensors: dict[str, Tensor] | None = None, **facts) -> None:
    """Write a router atomically: our safetensors format, or the released layout where `path` ends in .pt.

    The released layout has no place for weights: ValueError for a router that has them.

    facts: stored as metadata over `router.info` (method, model, image_size, cfg_scale, threshold, cur,
    reg_weight, train_steps, ...). tensors: kept beside the logits, e.g. an optimizer's state; the released
    layout drops them.
    """
    path = Path(path)
    info, own = _content(router, **facts)
    logits = own["logits"]
    if path.suffix == ".pt" and router.weights is not None:
        raise ValueError(f"{path}: the released layout has no place for weights of reuse; write .safetensors")
    with replacing(path) as partial:
        if path.suffix == ".pt":
            rows = {f"{step}.prob": row.clone() for step, row in enumerate(logits)}
            torch.save({"routers": rows, "opt": {}, "args": info}, partial)
        else:
            metadata = {
                key: value if isinstance(value, str) else json.dumps(value) for key, value in info.items()
            }
            save_file(own | (tensors or {}), partial, metadata=metadata)


def _content(router: Router, **facts) -> tuple[dict, dict[str, Tensor]]:
    """What a file of ours says of a router, and its tensors."""
    info = {**router.info, **facts}
    info.pop("path", None)
    info |= {"num_steps": router.num_steps, "num_branches": router.num_branches, "version": FORMAT_VERSION}
    logits = router.logits.detach().cpu().contiguous()
    own = {"logits": logits} | ({} if router.weights is None else {"weights": router.weights})
    return info, own | router.tensors


def load_router(
    path: str | Path, model: str | None = None, num_steps: int | None = None, num_branches: int | None = None
) -> Router:
    """Read a router: our format, or the released one of HarmoniCa or Learning-to-Cache. Nothing is executed.

    Which of them a file holds is told by its content, not by its name. A folder means its newest router.
    `model`, `num_steps`, `num_branches`: where given, they must be its own. Raises FileNotFoundError or
    ValueError, each naming the file and what was expected.
    """
    if named := _NAMED.fullmatch(str(path)):
        file, content = path, _read_named(Path(named[1]), named[2])
    else:
        file = find_router(path)
        own = is_safetensors(file) or (file.suffix == ".safetensors" and not is_pickle(file))
        content = _read_own(file) if own else _read_released(file)
    router = _from_content(file, *content)
    for fact, expected in (("model", model), ("num_steps", num_steps), ("num_branches", num_branches)):
        found = router.info.get(fact)
        if expected is not None and found is not None and found != expected:
            raise ValueError(
                f"{file} is a router for {fact} {found}, not {expected}; use a router trained for {expected}"
            )
    return router


def _from_content(file: str | Path, tensors: dict[str, Tensor], info: dict) -> Router:
    logits, weights = tensors.pop("logits"), tensors.pop("weights", None)
    _check(file, logits, weights, info)
    _check_any_speed(file, logits, tensors, info)
    router = Router.from_logits(logits.float())
    router.weights = None if weights is None else weights.float()
    router.tensors = tensors
    router.info = info | {"num_steps": len(logits), "num_branches": logits.shape[1], "path": str(file)}
    return router


def _check(file: str | Path, logits: Tensor, weights: Tensor | None, info: dict) -> None:
    """Raise ValueError, naming the file, for tables or a threshold that no router has.

    Infinite logits are allowed: Learning-to-Cache's odd steps have them.
    """
    tables = {"logits": logits} if weights is None else {"logits": logits, "weights": weights}
    for name, table in tables.items():
        if table.dtype not in DTYPES:
            raise ValueError(
                f"{file}: {name} are {str(table.dtype)[6:]}, not floating point; it is no router"
            )
    if logits.ndim != 2 or len(logits) < 2 or not logits.numel() or logits.isnan().any():
        raise ValueError(f"{file}: logits of shape {tuple(logits.shape)} or with NaN are no router")
    if weights is not None and (
        weights.ndim != 3
        or weights.shape[:2] != logits.shape
        or not weights.numel()
        or not weights.float().isfinite().all()
    ):
        raise ValueError(f"{file}: weights of shape {tuple(weights.shape)} or not finite fit no router")
    threshold = info.get("threshold", 0)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise ValueError(f"{file} says threshold {threshold!r}, which is no number in [0, 1); train it anew")
    for fact, found in (("num_steps", len(logits)), ("num_branches", logits.shape[1])):
        if "version" in info and info.get(fact, found) != found:
            raise ValueError(f"{file} says {fact} {info[fact]}, its logits are of {found}; it is damaged")


_SUFFIXES = (".pth", ".ckpt", ".bin", "")  # suffixes that routers of others may have, beside our own


def find_router(path: str | Path) -> Path:
    """The router that `path` means: itself, one that ships under that name, or a folder's newest.

    Of a folder, or its `checkpoints`, the one of most train steps. `registry.router_names` lists those that
    ship with the examples. USER/REPO is one on the Hub, fetched once.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (named := registry.router_file(str(path))) is not None:
        return named
    for folder in (path, path / "checkpoints"):
        found = [file for file in folder.glob("*") if file.is_file() and _may_be_router(file)]
        files = [file for file in found if not file.stem.endswith(".part")]
        if files:
            return max(files, key=lambda file: (_train_steps(file), file.name))
    if hub.is_repository(str(path)):
        return hub.fetch(str(path), cards.FILE)
    if path.is_dir():
        raise FileNotFoundError(
            f"no router (*.safetensors, *.pt, *.pth, ...) in folder {path}; train one with train_router.py"
        )
    raise FileNotFoundError(
        f"router {path} does not exist; give a router file, a folder that holds one, or the name of one that "
        f"ships: {', '.join(registry.router_names())}"
    )


def _may_be_router(file: Path) -> bool:
    """Whether a file may be a router: ours by its name, so that a damaged one is found, others by content."""
    is_ours = file.suffix in (".safetensors", ".pt")
    return is_ours or (file.suffix in _SUFFIXES and (is_pickle(file) or is_safetensors(file)))


def _train_steps(file: Path) -> int:
    """A router's train steps: its name, as checkpoints have it, or what it says of itself; else 0."""
    if file.stem.isdecimal():
        return int(file.stem)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return int((opened.metadata() or {})["train_steps"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError):
        return 0


def _check_any_speed(file: str | Path, logits: Tensor, tensors: dict[str, Tensor], info: dict) -> None:
    """Raise ValueError, naming the file, where the tables of a router for every speed-up do not fit."""
    if not tensors and "speedups" not in info:
        return
    num_steps, num_branches = logits.shape
    missing = [name for name in ANY_SPEED_TENSORS if name not in tensors]
    missing += [name for name in ANY_SPEED_FACTS if name not in info]
    if missing:
        raise ValueError(f"{file} is for every speed-up, but holds no {missing[0]}; it is damaged")
    order, gram, moves = (tensors[name] for name in ANY_SPEED_TENSORS)
    speedups = info["speedups"]
    shapes = {
        "order": (order.shape, (len(order), 2)),
        "gram": (gram.shape, (num_branches, num_steps, num_steps)),
        "moves": (moves.shape, (len(speedups), num_steps, num_branches, moves.shape[-1])),
    }
    for name, (found, wanted) in shapes.items():
        if tuple(found) != wanted or not tensors[name].float().isfinite().all():
            raise ValueError(f"{file}: {name} of shape {tuple(found)} or not finite fit no router")
    cells = {(step, branch) for step, branch in order.tolist()}
    inside = all(0 <= step < num_steps - 1 and 0 <= branch < num_branches for step, branch in cells)
    if len(cells) != len(order) or not inside or sorted(speedups) != list(speedups) or len(speedups) < 2:
        raise ValueError(f"{file}: its order of cells or its speed-ups are none; it is damaged")


def _read_own(file: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if _ROUTERS in metadata:
                names = json.loads(metadata[_ROUTERS])
                raise ValueError(f"{file} holds {len(names)} routers; name one: {file}:{min(names)}")
            held = [name for name in _TENSORS if name in opened.keys()]  # noqa: SIM118
            tensors = {name: opened.get_tensor(name) for name in held}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is no router file ({error}); give one that train_router.py wrote") from None
    if "logits" not in tensors:
        raise ValueError(f"{file} holds no logits; give a router file that train_router.py wrote")
    return tensors, {key: _parse(value) for key, value in metadata.items()}


def _parse(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _read_released(file: Path) -> tuple[dict[str, Tensor], dict]:
    """The layout `{"routers": {"0.prob": (B,), ...}, "opt": ..., "args": Namespace}`, or its rows alone."""
    content = load_pickle_safely(file)
    rows = content.get("routers", content) if isinstance(content, dict) else None
    if isinstance(rows, dict) and all(isinstance(name, str) for name in rows):
        rows, _ = unwrapped(rows)
    if not isinstance(rows, dict) or not rows or set(rows) != {f"{step}.prob" for step in range(len(rows))}:
        raise ValueError(
            f"{file} has no rows 'routers': {{'0.prob': ...}}; it is no HarmoniCa or Learning-to-Cache router"
        )
    ordered = [rows[f"{step}.prob"] for step in range(len(rows))]
    if not all(
        isinstance(row, Tensor)
        and row.ndim == 1
        and (row.shape, row.dtype, row.is_meta) == (ordered[0].shape, ordered[0].dtype, False)
        for row in ordered
    ):
        raise ValueError(f"{file} has rows that are no tensors of one length and dtype; it is no router")
    logits = torch.stack(ordered).detach()
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if "version" in args:  # written by save_router
        return {"logits": logits}, args
    names = {"num_sampling_steps": "num_steps", "l1": "reg_weight", "ste_threshold": "threshold"}
    kept = ("model", "image_size", "cfg_scale", "lr", *names)
    info = {names.get(key, key): args[key] for key in kept if args.get(key) is not None}
    # HarmoniCa fixes its first row at 5 and has --lambda-c; Learning-to-Cache has neither.
    harmonica = "lambda_c" in args or (not args and bool((logits[-1] == LOGIT_LIMIT).all()))
    if not harmonica and logits.is_floating_point():
        logits[1::2] = torch.inf  # L2C trains even rows only: odd steps compute everything
    return {"logits": logits}, info | {"method": "harmonica" if harmonica else "l2c"}


# ---- many routers in one file ----------------------------------------------------------------------

_ROUTERS = "routers"  # one entry of the metadata for all: safetensors writes several in any order
_NAMED = re.compile(r"(.+\.safetensors):(.+)")


def save_routers(path: str | Path, routers: dict[str, Router]) -> None:
    """Write many routers into one safetensors file, for `load_router("FILE.safetensors:NAME")`.

    Its tensors are NAME/logits, NAME/weights and so on; its metadata says of every name what `save_router`
    would.
    """
    tensors, infos = {}, {}
    for name, router in sorted(routers.items()):
        infos[name], own = _content(router)
        tensors |= {f"{name}/{part}": tensor for part, tensor in own.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={_ROUTERS: json.dumps(infos, sort_keys=True)})


def load_routers(path: str | Path) -> dict[str, Router]:
    """Read all routers that `save_routers` wrote. Raises FileNotFoundError or ValueError, naming the file."""
    with _opened(Path(path)) as (opened, infos):
        found = {name: _named_content(opened, name, info) for name, info in infos.items()}
    return {name: _from_content(f"{path}:{name}", *content) for name, content in found.items()}


def _read_named(file: Path, name: str) -> tuple[dict[str, Tensor], dict]:
    with _opened(file) as (opened, infos):
        if name not in infos:
            near = difflib.get_close_matches(name, infos, n=3, cutoff=0)
            raise ValueError(f"{file} holds no router {name!r}; it holds, among others: {', '.join(near)}")
        return _named_content(opened, name, infos[name])


def _named_content(opened, name: str, info: dict) -> tuple[dict[str, Tensor], dict]:
    held = [part for part in _TENSORS if f"{name}/{part}" in opened.keys()]  # noqa: SIM118
    return {part: opened.get_tensor(f"{name}/{part}") for part in held}, info


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple]:
    """An open file of `save_routers`, and what it says of each router by name.

    Raises FileNotFoundError, or ValueError where it does not read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a file of routers and a name: {file}:NAME")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield opened, json.loads((opened.metadata() or {})[_ROUTERS])
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no file of named routers ({error})") from None


def push(path: str, repository: str, folder: Path, private: bool = False) -> str:
    """Share a router on the Hub: the file, its schedule as a picture, a page. Returns the address.

    All of it is written to `folder` first, and stays there. Raises OSError, in one line, where the Hub cannot
    be reached.
    """
    router = load_router(path)
    threshold = router.info.get("threshold", DEFAULT_THRESHOLD)
    schedule = router.schedule(threshold)
    make_folder(folder)
    save_router(folder / cards.FILE, router)
    names = tuple(f"{k}.branch" for k in range(router.num_branches))
    title = f"{router.info.get('model', 'unknown model')}, T = {router.num_steps}"
    with replacing(folder / cards.PICTURE) as temporary:
        schedule_heat_map(router.scores(), threshold, names, title).save(temporary)
    facts = router.info | {"num_steps": router.num_steps}
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(cards.model_card(facts, schedule.cur, repository), encoding="utf-8")
    return hub.upload(folder, repository, private)


def parse_args() -> argparse.Namespace:
    if sys.argv[1:2] == ["push"]:
        return parse_push_args(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description="Show a router file, or export it to the released layout. `push` shares one on the Hub."
    )
    parser.add_argument("path", help="a router file, or a folder that holds one")
    parser.add_argument("--thres", type=cli.threshold, help="default: the router's own, else 0.1")
    parser.add_argument("--export", type=Path, metavar="FILE.pt", help="write the released HarmoniCa layout")
    args = parser.parse_args()
    if args.export and args.export.suffix != ".pt":
        parser.error(f"--export {args.export} does not end in .pt, the released layout's suffix")
    return args


def parse_push_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="router.py push PATH USER/REPO [--private]", description="Share a router on the Hub."
    )
    parser.add_argument("path", help="a router file, or a folder that holds one")
    parser.add_argument("repository", metavar="USER/REPO", help="it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    args = parser.parse_args(arguments)
    if not hub.is_repository(args.repository):
        parser.error(f"{args.repository} is no USER/REPO of the Hub")
    return args


def main(args: argparse.Namespace) -> None:
    if hasattr(args, "repository"):
        folder = Path("results") / "hub" / args.repository.replace("/", "--")
        print(f"shared at {push(args.path, args.repository, folder, args.private)}")
        return
    router = load_router(args.path)
    for fact, value in sorted(router.info.items()):
        print(f"{fact:14} {value}")
    if router.tensors:
        return
    schedule = router.schedule(
        args.thres if args.thres is not None else router.info.get("threshold", DEFAULT_THRESHOLD)
    )
    computed, total = int(schedule.compute.sum()), schedule.compute.numel()
    print(f"{schedule.source}: {computed} / {total} branches computed, CUR {100 * schedule.cur:.2f} %")
    if args.export:
        save_router(args.export, router)
        print(f"wrote {args.export}")


if __name__ == "__main__":
    cli.run(main, parse_args())
