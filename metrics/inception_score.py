"""Inception score (Salimans et al. 2016), in parts as ADM takes them."""

import numpy as np

from metrics.checks import require_finite

SPLIT_SIZE = 5000  # as in ADM's evaluator
_ROUNDING = 1e-3  # how far a row's sum may be from 1, as in half precision


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> tuple[float, float]:
    """Mean and standard deviation over parts of `exp(mean KL(p(y|x) || p(y)))`.

    probabilities: (n, classes). Parts are `split_size` consecutive samples, the last one what remains, and
    count alike: 10 parts for 50,000 samples, one part (and deviation 0) up to 5,000. The score rises with
    the size of a part, so sets of different numbers below 5,000 do not compare. Raises ValueError for what
    is no probabilities.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not probabilities.size or probabilities.dtype.kind != "f":
        raise ValueError(
            f"probabilities are {probabilities.dtype} {probabilities.shape}; floats (n, classes) are needed"
        )
    require_finite(probabilities, "probabilities")
    scores = []
    for first in range(0, len(probabilities), split_size):
        p = probabilities[first : first + split_size].astype(np.float64)
        if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > _ROUNDING:
            raise ValueError(
                f"probabilities reach from {p.min():.3g} with sums from {p.sum(axis=1).min():.6g} to "
                f"{p.sum(axis=1).max():.6g}; none is below 0, and those of a sample add up to 1"
            )
        marginal = p.mean(axis=0)
        tiny = np.finfo(np.float64).tiny  # a probability of 0 adds nothing
        kl = (p * (np.log(p.clip(tiny)) - np.log(marginal.clip(tiny)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))
