"""What caches that decide at run time watch in a model: its residual stream, its first branch's input."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Tell = Callable[[Tensor], None]


def block_starts(branches: Sequence[str]) -> list[int]:
    """The index of each block's first branch. branches: a backbone's names, BLOCK.KIND."""
    blocks = [name.rpartition(".")[0] for name in branches]
    return [index for index, block in enumerate(blocks) if index == 0 or block != blocks[index - 1]]


def first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a block or branch module reads, by the calling conventions of diffusers."""
    return args[0] if args else kwargs["hidden_states"]


def watch_stream(blocks: Sequence[nn.Module], place: int, tell: Tell) -> RemovableHandle:
    """Call `tell` in every forward with the residual stream before block `place`.

    place: len(blocks) is after the last one. Blocks return the stream as their only or their last output, as
    those of diffusers do.
    """
    if place < len(blocks):

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tell(first_input(args, kwargs))

        return blocks[place].register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        tell(output[-1] if isinstance(output, tuple) else output)

    return blocks[-1].register_forward_hook(after)
