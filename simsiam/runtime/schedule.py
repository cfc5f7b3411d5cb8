"""The learning-rate schedule."""

import math


def cosine_schedule(progress: float, epochs: int, warmup_epochs: float = 0) -> float:
    """Return the learning rate over its peak, from 0 to 1, after `progress` of `epochs` epochs.

    Linear warm-up, then a cosine to 0. `progress` is fractional: the rate changes in each step (in
    the authors' code, in each epoch).
    """
    if progress < warmup_epochs:
        return progress / warmup_epochs
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup_epochs) / (epochs - warmup_epochs)))
