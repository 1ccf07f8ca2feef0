"""LPIPS (Zhang et al. 2018) by the authors' package, its AlexNet read from a local file."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from common.files import load_pickle_safely
from metrics.checks import require_finite, require_finite_weights

SMALLEST = 32  # pixels a side; of smaller images AlexNet's pooling leaves nothing


def load_lpips(weights: str | Path, device: torch.device | str = "cpu"):
    """A function of two uint8 image batches (n, H, W, 3) that returns their distances (n,).

    weights: torchvision's AlexNet, `alexnet-owt-*.pth`; the package brings the rest. Raises FileNotFoundError
    or ValueError where the file or the package is missing.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"--lpips-weights {weights} does not exist; give torchvision's AlexNet, alexnet-owt-7be5be79.pth"
        )
    try:
        from lpips import LPIPS
    except ImportError:
        raise ValueError("LPIPS needs the package lpips: pip install lpips") from None
    with warnings.catch_warnings():  # it calls torchvision in a way that is going out of use
        warnings.simplefilter("ignore")
        model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = load_pickle_safely(Path(weights))
    require_finite_weights(state, weights)
    wanted = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    if not isinstance(state, dict) or not set(wanted.values()) <= set(state):
        raise ValueError(
            f"--lpips-weights {weights} is no AlexNet of torchvision; give alexnet-owt-7be5be79.pth"
        )
    model.net.load_state_dict({name: state[source] for name, source in wanted.items()})
    model.eval().requires_grad_(False).to(device)

    def distance(samples: Tensor, reference: Tensor) -> Tensor:
        def scaled(images: Tensor) -> Tensor:
            return images.permute(0, 3, 1, 2).to(device).float() / 127.5 - 1

        distances = model(scaled(samples), scaled(reference)).flatten().cpu()
        require_finite(distances, f"LPIPS distances by {weights}")
        return distances

    return distance
