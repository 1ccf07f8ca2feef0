"""Where the branches of diffusers' transformers are: one row per class.

A branch is a module of a block whose output the block adds to its residual stream (after a gate, where there
is one). The order of the branches is that of the table: stack by stack, block by block. It is the order of a
router's columns.
To add a class, write its row; `docs/diffusers.md` says how to check it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Kind:
    """One kind of branch in the blocks of a stack, by the names of modules within the block.

    output: the module whose output the branch is. feeders: modules that nothing but `output` reads. norms:
    layer norms whose tokens nothing but `output`, or other kinds that name the same norm, reads. Where the
    branch is reused, feeders and norms compute nothing.
    """

    output: str
    feeders: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


FAMILIES: dict[str, dict[str, tuple[Kind, ...]]] = {
    "DiTTransformer2DModel": {
        "transformer_blocks": (Kind("attn1", norms=("norm1.norm",)), Kind("ff", norms=("norm3",))),
    },
    "PixArtTransformer2DModel": {
        "transformer_blocks": (Kind("attn1", norms=("norm1",)), Kind("attn2"), Kind("ff", norms=("norm2",))),
    },
    "SD3Transformer2DModel": {
        "transformer_blocks": (
            Kind("attn", norms=("norm1.norm", "norm1_context.norm")),
            Kind("attn2", norms=("norm1.norm",)),  # in some blocks of SD 3.5 alone
            Kind("ff", norms=("norm2",)),
            Kind("ff_context", norms=("norm2_context",)),  # not in the last block
        ),
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": (
            Kind("attn", norms=("norm1.norm", "norm1_context.norm")),
            Kind("ff", norms=("norm2",)),
            Kind("ff_context", norms=("norm2_context",)),
        ),
        "single_transformer_blocks": (Kind("proj_out", ("attn", "proj_mlp"), ("norm.norm",)),),
    },
    # norm2 feeds a convolution that needs the picture's shape.
    "SanaTransformer2DModel": {
        "transformer_blocks": (Kind("attn1", norms=("norm1",)), Kind("attn2"), Kind("ff")),
    },
    # Modulations of Wan 2.2 and of Qwen's edit models have a value for every token: their norms must run.
    "WanTransformer3DModel": {"blocks": (Kind("attn1"), Kind("attn2"), Kind("ffn"))},
    "QwenImageTransformer2DModel": {"transformer_blocks": (Kind("attn"), Kind("img_mlp"), Kind("txt_mlp"))},
}


@dataclass(frozen=True, eq=False)
class Branch:
    """One branch of a transformer. name: STACK.BLOCK.OUTPUT, a path from the transformer."""

    name: str
    kind: str
    block: nn.Module
    spec: Kind

    @property
    def module(self) -> nn.Module:
        """The module whose output the branch is."""
        return self.block.get_submodule(self.spec.output)

    @property
    def feeders(self) -> list[nn.Module]:
        return [self.block.get_submodule(path) for path in self.spec.feeders]

    @property
    def norms(self) -> list[nn.Module]:
        found = (_submodule(self.block, path) for path in self.spec.norms)
        return [norm for norm in found if norm is not None]


def find_branches(transformer: nn.Module) -> list[Branch]:
    """All branches of a transformer in the order of its router's columns.

    Raises ValueError for a class that the table does not have, naming those that it has.
    """
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ValueError(f"{name} is not supported; supported are {', '.join(FAMILIES)}")
    return list(_branches(transformer, FAMILIES[name]))


def _branches(transformer: nn.Module, stacks: dict[str, tuple[Kind, ...]]) -> Iterator[Branch]:
    for stack, kinds in stacks.items():
        for number, block in enumerate(getattr(transformer, stack)):
            for kind in kinds:
                if _submodule(block, kind.output) is not None:
                    yield Branch(f"{stack}.{number}.{kind.output}", kind.output, block, kind)


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    """A module within a block; None where the block was built without it."""
    for name in path.split("."):
        block = getattr(block, name, None)
        if block is None:
            return None
    return block
