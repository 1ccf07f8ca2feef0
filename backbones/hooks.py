"""Schedules on diffusers' own transformers, through hooks that leave no trace.

    from backbones import apply_schedule, remove_schedule, scheduled, summary

    apply_schedule(pipeline, "ROUTER.safetensors")      # then use the pipeline as before
    image = pipeline("a green heart", num_inference_steps=20).images[0]
    remove_schedule(pipeline)

Every branch (`families.py` lists them) asks a policy of `cache.py` for its output, as the branches of our DiT
do; a reused branch runs none of its layers, nor the norm that feeds it alone. With a pipeline the step comes
from its scheduler. A bare transformer needs `session.start()` before each trajectory.
"""

import contextlib
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from backbones.contract import Cache
from backbones.families import Branch, find_branches
from cache import StaticCache
from router import DEFAULT_THRESHOLD, Schedule, load_router

HOOK = "harmonica"
_COPYING = "a transformer with a schedule cannot be copied or pickled; call remove_schedule first"
# Our samplers by the class of diffusers' scheduler.
_SAMPLERS = {
    "DDIMScheduler": ("ddim",),
    "DDPMScheduler": ("ddpm", "iddpm"),
    "DPMSolverMultistepScheduler": ("dpm-solver++",),
    "SASolverScheduler": ("sa-solver",),
    "FlowMatchEulerDiscreteScheduler": ("flow-euler",),
}
_OTHER_CACHES = ("Cache", "PyramidAttention")  # in the names of diffusers' hooks that cache, too


# ---- hooks -----------------------------------------------------------------------------------------


class _BranchHook(ModelHook):
    """At a branch: `policy(index, compute)` instead of the module; plain where there is no policy."""

    def __init__(self, hooks: "Hooks", index: int):
        super().__init__()
        self.hooks, self.index = hooks, index
        self._wrapped: Callable | None = None  # compiled, or with activation checkpointing

    def compute(self, *args, **kwargs) -> Any:
        """The module's own output."""
        return (self._wrapped or self.fn_ref.original_forward)(*args, **kwargs)

    def wrap(self, wrap: Callable[[Callable], Callable]) -> None:
        self._wrapped = wrap(self._wrapped or self.fn_ref.original_forward)

    def new_forward(self, _module: nn.Module, *args, **kwargs) -> Any:
        if self.hooks.policy is None:
            return self.compute(*args, **kwargs)
        return self.hooks.ask(self.index, partial(self.compute, *args, **kwargs))


class _FeederHook(ModelHook):
    """At a module that feeds branches alone: where all of them are reused, nothing of its input passes."""

    def __init__(self, hooks: "Hooks", branches: list[int], dim: int):
        super().__init__()
        self.hooks, self.branches, self.dim = hooks, branches, dim

    def new_forward(self, _module: nn.Module, *args, **kwargs) -> Any:
        computing = self.hooks.computing
        if computing is None or any(computing[branch] for branch in self.branches):
            return self.fn_ref.original_forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return x.narrow(self.dim, 0, 0)  # an empty view


class Hooks:
    """The hooks of one transformer, and the policy that its branches ask now; one for all of its sessions.

    Branch outputs that are pairs (image and text tokens of a joint attention) are one tensor for the policy,
    joined along the tokens.
    """

    def __init__(self, transformer: nn.Module):
        self.branches = find_branches(transformer)
        self.transformer = weakref.ref(transformer)
        self.policy: Cache | None = None
        self.computing: list[bool] | None = None  # which branches this forward computes; None: all
        self.splits: dict[int, tuple[int, ...]] = {}  # tokens of each part of a pair, by branch
        self.modules = [branch.module for branch in self.branches]
        self.branch_hooks = [_BranchHook(self, index) for index in range(len(self.branches))]
        for module, hook in zip(self.modules, self.branch_hooks, strict=True):
            _register(module, hook)
        for module, branches, dim in self._feeders():
            _register(module, _FeederHook(self, branches, dim))
        _forget_registries(transformer)

    def _feeders(self) -> Iterator[tuple[nn.Module, list[int], int]]:
        """(module, the branches that it feeds, dimension of the view that stands for its output)."""
        found: dict[int, tuple[nn.Module, list[int], int]] = {}
        for index, branch in enumerate(self.branches):
            for modules, dim in ((branch.feeders, -1), (branch.norms, 1)):  # channels, tokens
                for module in modules:
                    found.setdefault(id(module), (module, [], dim))[1].append(index)
        yield from found.values()

    @torch.compiler.disable(recursive=False)
    def ask(self, index: int, compute: Callable[[], Any]) -> Any:
        """A branch's output by the policy, a pair where the module's is one."""

        def joined() -> Tensor:
            output = compute()
            if isinstance(output, Tensor):
                self.splits.pop(index, None)
                return output
            if not isinstance(output, tuple) or len(output) != 2:
                raise ValueError(
                    f"{self.branches[index].name} returns {len(output)} outputs (an IP-adapter?), which a "
                    "schedule cannot reuse; call remove_schedule, or unload the adapter"
                )
            self.splits[index] = tuple(part.shape[1] for part in output)
            return torch.cat(output, dim=1)  # (N, image and text tokens, D)

        output = self.policy(index, joined)
        return output.split(self.splits[index], dim=1) if index in self.splits else output

    def wrap(self, wrap: Callable[[Callable], Callable]) -> None:
        """Let `wrap` of a branch's function run in its place; a wrapper around an earlier one."""
        for hook in self.branch_hooks:
            hook.wrap(wrap)

    def verify(self) -> None:
        """Raise ValueError where the transformer is not as it was when the hooks were registered."""
        transformer = self.transformer()
        for branch, module in zip(self.branches, self.modules, strict=True):
            if _submodule(branch) is not module:
                raise ValueError(
                    f"{branch.name} was replaced since the schedule was applied (a LoRA?); call "
                    "apply_schedule again"
                )
        check_supported(transformer)

    def check_gradients(self) -> None:
        """Raise ValueError where the library would run blocks again for their gradient."""
        if torch.is_grad_enabled() and getattr(self.transformer(), "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs a block twice, and the second time reads a store that has moved "
                "on; call disable_gradient_checkpointing, and use --recompute-branches"
            )

    def remove(self) -> None:
        """Take every hook away, and what diffusers leaves behind of a hook."""
        transformer = self.transformer()
        for module in transformer.modules():
            registry = module.__dict__.get("_diffusers_hook")
            if registry is None or HOOK not in registry.hooks:
                continue
            registry.remove_hook(HOOK, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook
                if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                    del module.forward
        _forget_registries(transformer)

    def __deepcopy__(self, _memo) -> "Hooks":
        raise ValueError(_COPYING)

    def __reduce_ex__(self, _protocol):
        raise ValueError(_COPYING)


def _register(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)


def _forget_registries(transformer: nn.Module) -> None:
    """diffusers remembers which modules have hooks, for group offloading and its caches."""
    for module in transformer.modules():
        if (registry := module.__dict__.get("_diffusers_hook")) is not None:
            registry._child_registries_cache = None


def _submodule(branch: Branch) -> nn.Module | None:
    try:
        return branch.module
    except AttributeError:
        return None


def check_supported(transformer: nn.Module) -> None:
    """Raise ValueError for what a schedule does not go together with: other caches, chunked feed-forward."""
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("another cache is enabled on this transformer; call its disable_cache() first")
    for name, module in transformer.named_modules():
        if getattr(module, "_chunk_size", None) is not None:
            raise ValueError(f"{name} computes in chunks; call disable_forward_chunking() first")
        registry = module.__dict__.get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            kind = type(hook).__name__
            if any(word in kind for word in _OTHER_CACHES):
                raise ValueError(
                    f"{name or 'the transformer'} has diffusers' {kind}; remove that cache first"
                )


# ---- sessions --------------------------------------------------------------------------------------


class _Store(StaticCache):
    """A `StaticCache` of a trajectory that may begin later than at its first step.

    Image-to-image does so; a cell whose outputs were never stored is computed.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype | None):
        super().__init__(schedule, dtype)
        self._needed = schedule.outputs_read().tolist()
        self.splits: dict[int, tuple[int, ...]] = {}

    def go_to(self, step: int) -> list[bool]:
        """Be at a step; returns which branches it computes."""
        self.step, row = step, zip(self.computed[step], self._stored, self._needed[step], strict=True)
        self.computed[step] = [one or len(stored) < least for one, stored, least in row]
        return self.computed[step]


class Session:
    """A schedule at work on a transformer, for one pipeline or for calls by hand.

    `computed` and `reused` count the calls of every branch since the schedule was applied. trained_under: the
    sampler of the schedule's router; "": unknown.
    """

    def __init__(
        self,
        hooks: Hooks,
        schedule: Schedule,
        dtype: torch.dtype | None,
        pipeline: object | None = None,
        trained_under: str = "",
    ):
        self.hooks, self.schedule, self.dtype = hooks, schedule, dtype
        self._trained_under, self._noted = trained_under, ""
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.computed, self.reused = [0] * schedule.num_branches, [0] * schedule.num_branches
        self.most_bytes = 0
        self._timesteps: Tensor | None = None
        self._running = False  # within a call of the transformer
        self.start()

    @property
    def pipeline(self) -> object | None:
        return None if self._pipeline is None else self._pipeline()

    @property
    def names(self) -> list[str]:
        return [branch.name for branch in self.hooks.branches]

    def start(self) -> None:
        """Begin a trajectory with an empty store; with a pipeline this happens by itself."""
        self._stores: dict[int, _Store] = {}  # by the number of the call within a step
        self._step: int | None = None
        self._call, self._timestep, self._shapes = 0, None, {}

    def stored_bytes(self) -> int:
        return sum(store.stored_bytes() for store in self._stores.values())

    # ---- one call of the transformer

    def before(self, timestep: Any, shape: torch.Size) -> None:
        if self._running:  # the call before was interrupted
            self._abandon()
        self.hooks.check_gradients()
        step = self._locate(timestep)
        self._call = self._call + 1 if step == self._step else 0
        self._step = step
        if self._shapes.setdefault(self._call, shape) != shape:
            raise ValueError(
                f"the input has shape {tuple(shape)} after {tuple(self._shapes[self._call])} at an earlier "
                "step; call session.start() before each trajectory"
            )
        if self._call not in self._stores:
            self._stores[self._call] = _Store(self.schedule, self.dtype)
        store, self._running = self._stores[self._call], True
        self.hooks.policy, self.hooks.computing = store, store.go_to(step)
        self.hooks.splits = store.splits

    def after(self, finished: bool) -> None:
        computing = self.hooks.computing
        self.hooks.policy = self.hooks.computing = None
        self._running = False
        if not finished:  # an exception
            self._abandon()
            return
        for branch, one in enumerate(computing):
            (self.computed if one else self.reused)[branch] += 1
        self.most_bytes = max(self.most_bytes, self.stored_bytes())

    def _abandon(self) -> None:
        """Drop a trajectory that was interrupted within a step: its store is not that of a step."""
        self.start()
        self._timesteps, self._running = None, False

    # ---- which step it is

    def _locate(self, timestep: Any) -> int:
        pipeline = self.pipeline
        if self._pipeline is not None and pipeline is None:
            raise ValueError("the pipeline of this schedule is gone; call apply_schedule on the new one")
        return (
            self._by_hand(timestep) if pipeline is None else self._of_scheduler(pipeline.scheduler, timestep)
        )

    def _by_hand(self, timestep: Any) -> int:
        """A call with the same timestep as the one before belongs to its step, any other to the next."""
        value, last = _value(timestep), self.schedule.num_steps - 1
        if self._step is None:
            self.hooks.verify()
            step = last
        else:
            step = self._step if value == self._timestep else self._step - 1
        if step < 0:
            raise ValueError(
                f"the schedule is for {last + 1} steps and all were taken; call session.start() before each "
                "trajectory"
            )
        self._timestep = value
        return step

    def _of_scheduler(self, scheduler: Any, timestep: Any) -> int:
        if scheduler.timesteps is not self._timesteps:  # set_timesteps makes a new tensor: a new request
            self.start()
            self.hooks.verify()
            self._values = _checked_timesteps(scheduler, self.schedule.num_steps)
            self._note_another_sampler(type(scheduler).__name__)
            self._timesteps = scheduler.timesteps
        done = getattr(scheduler, "step_index", None)
        if done is None:
            done = getattr(scheduler, "begin_index", None)
        if done is None:
            done = _index_of(timestep, self._values)
        if not 0 <= done < len(self._values):
            raise ValueError(
                f"the scheduler is at step {done} of {len(self._values)}; call set_timesteps anew"
            )
        return self.schedule.num_steps - 1 - done

    def _note_another_sampler(self, scheduler: str) -> None:
        """Warn, once for each class of scheduler, where the router was trained under another sampler."""
        here = _SAMPLERS.get(scheduler, (scheduler,))
        if self._trained_under and self._trained_under not in here and scheduler != self._noted:
            self._noted = scheduler
            warnings.warn(
                f"the router was trained under {self._trained_under}, this pipeline samples with "
                f"{scheduler}; sample.py --calibrate fits its weights of reuse to another sampler",
                stacklevel=2,
            )


def _checked_timesteps(scheduler: Any, num_steps: int) -> list[float]:
    kind, values = type(scheduler).__name__, scheduler.timesteps.tolist()
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(f"{kind} calls the model more than once a step; take a scheduler of order 1")
    if len(set(values)) < len(values) and not hasattr(scheduler, "step_index"):
        raise ValueError(
            f"{kind} repeats timesteps, so its steps cannot be told apart; take another scheduler"
        )
    if len(values) != num_steps:
        raise ValueError(
            f"the schedule is for {num_steps} steps, the pipeline takes {len(values)}; use "
            f"num_inference_steps={num_steps} or another router"
        )
    return values


def _value(timestep: Any) -> float:
    return float(torch.as_tensor(timestep).max())


def _index_of(timestep: Any, values: list[float]) -> int:
    """The step whose timestep the model is called with, as it is or divided by 1000 (Flux, Qwen-Image)."""
    value = _value(timestep)
    for scale in (1.0, 1000.0):
        index = min(range(len(values)), key=lambda k: abs(values[k] - scale * value))
        if abs(values[index] - scale * value) <= 1e-3 * max(1.0, abs(values[index])):
            return index
    raise ValueError(f"timestep {value:g} is none of the scheduler's; the step cannot be told")


# ---- a transformer's sessions ----------------------------------------------------------------------


class _Installed:
    """What is on one transformer: its hooks, and a session for each pipeline that uses it."""

    def __init__(self, transformer: nn.Module):
        self.hooks = Hooks(transformer)
        self.sessions: dict[int, Session] = {}  # by the id of the pipeline, or of the transformer
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._places = {name: names.index(name) for name in ("hidden_states", "timestep")}
        self._active: Session | None = None
        # Root hooks of torch: accelerate strips a ModelHook of diffusers when it offloads.
        self._handles = [
            transformer.register_forward_pre_hook(self.before, with_kwargs=True),
            transformer.register_forward_hook(self.after, always_call=True),
        ]

    @torch.compiler.disable
    def before(self, _transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._active = None
        if kwargs.get("skip_layers"):  # SD3's guidance without some layers: another model
            return
        session = self._calling()
        given = {
            name: kwargs[name] if name in kwargs else args[place] for name, place in self._places.items()
        }
        session.before(given["timestep"], given["hidden_states"].shape)
        self._active = session

    @torch.compiler.disable
    def after(self, _transformer: nn.Module, _args: tuple, output: Any) -> None:
        if self._active is not None:
            self._active.after(output is not None)
            self._active = None

    def _calling(self) -> Session:
        """The session of the pipeline that calls; the only one, where there is one."""
        for key in [key for key, one in self.sessions.items() if one._pipeline and one.pipeline is None]:
            del self.sessions[key]
        if len(self.sessions) == 1:
            return next(iter(self.sessions.values()))
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if id(owner) in self.sessions and self.sessions[id(owner)].pipeline is owner:
                return self.sessions[id(owner)]
            frame = frame.f_back
        raise ValueError(
            f"{len(self.sessions)} pipelines have a schedule on this transformer and none of them calls it; "
            "call remove_schedule on those that are not in use"
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.hooks.remove()

    def __deepcopy__(self, _memo) -> "_Installed":
        raise ValueError(_COPYING)

    def __reduce_ex__(self, _protocol):
        raise ValueError(_COPYING)


_INSTALLED: "weakref.WeakKeyDictionary[nn.Module, _Installed]" = weakref.WeakKeyDictionary()


def transformer_of(owner: Any) -> nn.Module:
    """A pipeline's transformer, or the transformer itself, without the wrapper of torch.compile.

    Raises ValueError where there is none, or more than one.
    """
    transformer = owner if isinstance(owner, nn.Module) else getattr(owner, "transformer", None)
    if transformer is None:
        raise ValueError(
            f"{type(owner).__name__} has no transformer; give a pipeline that has one, or the transformer"
        )
    if owner is not transformer and getattr(owner, "transformer_2", None) is not None:
        raise ValueError(
            f"{type(owner).__name__} has two transformers; apply a schedule to one of them, with "
            "session.start() before each request"
        )
    return getattr(transformer, "_orig_mod", transformer)


def as_schedule(
    given: Schedule | str | Path, threshold: float | None, transformer: nn.Module
) -> tuple[Schedule, str]:
    """A schedule as it is, or that of a router by its path or name, at `threshold` or its own.

    Also the sampler that the router was trained under; "" where nothing says it.
    Raises ValueError where it has not as many branches as the transformer.
    """
    if isinstance(given, Schedule):
        if threshold is not None:
            raise ValueError("threshold is for a router; a schedule says already what is computed")
        schedule, sampler = given, ""
    elif not isinstance(given, str | Path):
        raise ValueError(
            f"a {type(given).__name__} is no static schedule; give a router.Schedule, or a router's path"
        )
    else:
        router = load_router(given)
        schedule = router.schedule(
            router.info.get("threshold", DEFAULT_THRESHOLD) if threshold is None else threshold
        )
        sampler = router.info.get("sampler", "")
    found = len(find_branches(transformer))
    if schedule.num_branches != found:
        raise ValueError(
            f"the schedule is for {schedule.num_branches} branches, {type(transformer).__name__} has "
            f"{found}; use a router trained for this model"
        )
    return schedule, sampler


def apply_schedule(
    pipeline_or_transformer: Any,
    schedule_or_router: Schedule | str | Path,
    threshold: float | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Session:
    """Let a pipeline, or a bare transformer, compute what a schedule says and reuse the rest.

    schedule_or_router: a `router.Schedule`, a router file, a folder that holds one, or the name of one that
    ships. threshold: for a router; None: its own. cache_dtype: dtype of the stored branch outputs; None: as
    they are computed. A schedule that was applied before is replaced. Raises ValueError, in one line, for a
    class that is not supported and for what does not go together with a schedule.
    """
    transformer = transformer_of(pipeline_or_transformer)
    schedule, sampler = as_schedule(schedule_or_router, threshold, transformer)
    is_pipeline = not isinstance(pipeline_or_transformer, nn.Module)
    key = id(pipeline_or_transformer) if is_pipeline else id(transformer)
    installed = _INSTALLED.get(transformer)
    if installed is not None:  # the hooks are made anew: modules may have been replaced
        sessions = {other: one for other, one in installed.sessions.items() if other != key}
        installed.remove()
        del _INSTALLED[transformer]
    else:
        sessions = {}
    check_supported(transformer)
    installed = _Installed(transformer)
    for one in sessions.values():
        one.hooks = installed.hooks
        one.start()
    pipeline = pipeline_or_transformer if is_pipeline else None
    session = Session(installed.hooks, schedule, cache_dtype, pipeline, sampler)
    installed.sessions = sessions | {key: session}
    _INSTALLED[transformer] = installed
    return session


def remove_schedule(pipeline_or_transformer: Any) -> None:
    """Take away what `apply_schedule` did; without the last schedule no hook or attribute stays.

    Given a transformer, the schedules of all its pipelines go. Raises ValueError where there is none.
    """
    transformer = transformer_of(pipeline_or_transformer)
    installed = _INSTALLED.get(transformer)
    is_pipeline = not isinstance(pipeline_or_transformer, nn.Module)
    if installed is None or (is_pipeline and id(pipeline_or_transformer) not in installed.sessions):
        raise ValueError(f"no schedule is applied to this {type(pipeline_or_transformer).__name__}")
    if is_pipeline:
        del installed.sessions[id(pipeline_or_transformer)]
    else:
        installed.sessions.clear()
    if not installed.sessions:
        installed.remove()
        del _INSTALLED[transformer]


@contextlib.contextmanager
def scheduled(
    pipeline_or_transformer: Any,
    schedule_or_router: Schedule | str | Path,
    threshold: float | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[Session]:
    """`apply_schedule` for the length of a `with` block."""
    session = apply_schedule(pipeline_or_transformer, schedule_or_router, threshold, cache_dtype)
    try:
        yield session
    finally:
        remove_schedule(pipeline_or_transformer)


def session_of(pipeline_or_transformer: Any) -> Session:
    """The session of a pipeline or transformer. Raises ValueError where no schedule is applied."""
    transformer = transformer_of(pipeline_or_transformer)
    installed = _INSTALLED.get(transformer)
    is_pipeline = not isinstance(pipeline_or_transformer, nn.Module)
    key = id(pipeline_or_transformer) if is_pipeline else id(transformer)
    if installed is None or key not in installed.sessions:
        raise ValueError(f"no schedule is applied to this {type(pipeline_or_transformer).__name__}")
    return installed.sessions[key]


def summary(pipeline_or_transformer: Any) -> dict[str, dict[str, int]]:
    """What was computed, reused and stored since the schedule was applied, by kind of branch.

    For each kind `computed` and `reused` calls; under `all` their sums, and `stored_bytes`, the most that the
    store held at the end of a step.
    """
    session = session_of(pipeline_or_transformer)
    found: dict[str, dict[str, int]] = {}
    for branch, computed, reused in zip(
        session.hooks.branches, session.computed, session.reused, strict=True
    ):
        counts = found.setdefault(branch.kind, {"computed": 0, "reused": 0})
        counts["computed"] += computed
        counts["reused"] += reused
    total = {name: sum(counts[name] for counts in found.values()) for name in ("computed", "reused")}
    return found | {"all": total | {"stored_bytes": session.most_bytes}}
