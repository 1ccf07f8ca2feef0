"""A whole trajectory as one CUDA graph, which is possible since a schedule does not depend on the input."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from backbones.denoiser import check_guidance, condition_for
from cache import Combine
from common.timing import captured
from router import Schedule
from sampling.loop import Generators, Trajectory, denoise_loop, draw_step_noise


class Captured:
    """`sampling.sample` as a CUDA graph per trajectory and batch: captured at the first call, then replayed.

    Each graph keeps its own activations; inputs are copied into it and x_0 out of it. What the backbone makes
    of the labels is an input, for it may come from the host, as the embeddings of prompts do.
    """

    def __init__(self, cache_dtype: torch.dtype | None = None, combine: Combine | None = None) -> None:
        self._store = {"dtype": cache_dtype, "combine": combine}
        self._captured: dict[tuple, _Graph] = {}

    def __call__(
        self, trajectory: Trajectory, labels: Tensor, noise: Tensor, generator: Generators = None
    ) -> Tensor:
        trajectory.check(labels, noise)
        if not isinstance(trajectory.schedule, Schedule | None):
            raise ValueError(
                "a CUDA graph needs a static schedule, and this method decides while it samples; add "
                "--no-cuda-graph"
            )
        check_guidance(trajectory.backbone, trajectory.cfg_scale)
        step_noise = draw_step_noise(trajectory, noise, generator)
        condition = condition_for(trajectory.backbone, labels, trajectory.cfg_scale)
        leaves, structure = tree_flatten((labels, noise, step_noise, condition))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = [leaves[k] for k in places]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # The graph holds the trajectory, so no other one takes its id.
        key = (id(trajectory), *((one.shape, one.dtype) for one in inputs))
        if key not in self._captured:
            # Made outside of the capture: its weights come from the host. Its store is empty after a run.
            cache = trajectory.cache(**self._store)

            def run(*inputs: Tensor) -> Tensor:
                own = list(others)
                for k, tensor in zip(places, inputs, strict=True):
                    own[k] = tensor
                labels, noise, step_noise, condition = tree_unflatten(own, structure)
                *_, (_, x_0) = denoise_loop(trajectory, labels, noise, cache, step_noise, condition)
                return x_0

            self._captured[key] = _Graph(run, inputs)
        return self._captured[key](*inputs)


class _Graph:
    """A captured function of tensors: the device runs its kernels again without the host's work.

    Every replay reads tensors that the function holds on the device, so the function is kept.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor]):
        self._inputs, self._function = [tensor.clone() for tensor in inputs], function
        self._graph, self._output = captured(lambda: function(*self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()
