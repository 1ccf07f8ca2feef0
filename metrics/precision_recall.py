"""Improved precision and recall (Kynkaanniemi et al. 2019): does a sample lie on the other set's manifold?"""

import torch
from torch import Tensor

from metrics.checks import require_finite

K = 3  # the neighbour that a point reaches to, as ADM has it


def precision_recall(
    features: Tensor, reference: Tensor, k: int = K, block: int = 250
) -> tuple[float, float]:
    """Share of samples within reach of the reference, and of the reference within reach of the samples.

    features (n, D), reference (m, D). A point reaches as far as its k-th nearest neighbour in its own set.
    Works on blocks of rows: memory (block, max(n, m)). Raises ValueError for k or fewer points and for what
    is not finite.
    """
    if features.ndim != 2 or features.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"features {tuple(features.shape)} and {tuple(reference.shape)} are not (n, D), (m, D)"
        )
    for points in (features, reference):
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour each; give more than {k}")
        require_finite(points, "features")
    return _share_within(features, reference, k, block), _share_within(reference, features, k, block)


def _share_within(points: Tensor, manifold: Tensor, k: int, block: int) -> float:
    # The nearest neighbour of a point in its own set is itself: the k-th one is number k + 1.
    radii = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(block)])
    require_finite(radii, "distances between features")  # else every point were within reach
    within = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(block)]
    return torch.cat(within).double().mean().item()
