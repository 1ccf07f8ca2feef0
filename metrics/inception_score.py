"""Inception score (Salimans et al. 2016)."""

import numpy as np

SPLITS = 10


def inception_score(probabilities: np.ndarray, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of `exp(mean KL(p(y|x) || p(y)))`.

    probabilities: (n, classes). Splits are consecutive, not shuffled, as ADM takes them: 10 of 5,000 for
    50,000. Raises ValueError for fewer samples than splits.
    """
    n = len(probabilities)
    if n < splits:
        raise ValueError(f"{n} samples cannot be split into {splits} parts; give more samples")
    scores = []
    for i in range(splits):
        p = np.asarray(probabilities[i * n // splits : (i + 1) * n // splits], dtype=np.float64)
        marginal = p.mean(axis=0)
        tiny = np.finfo(np.float64).tiny  # a probability of 0 adds nothing
        kl = (p * (np.log(p.clip(tiny)) - np.log(marginal.clip(tiny)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))
