"""Had a run learned what it could? The rule: twice the steps would hardly have lowered its loss.

    ln loss = a + b ln step            least squares over the second half of the training
    gain of twice the steps = 1 - 2^b  not converged if above 5 %, and b is below 0 by more than its standard error

A power law, as learning curves follow (Hestness et al. 2017). Looking only at how flat the last steps are would be
fooled by every schedule that ends at a learning rate of 0: there all losses are flat. The decay is counted as learning,
so the rule errs towards "not converged". A comparison of Qs is about the budget of training as much as about Q where a
run fails it; reports mark it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GAIN = 0.05
_FEWEST = 5  # logged lines in the second half


def converged(metrics: Sequence[Mapping[str, Any]]) -> bool | None:
    """The rule on the lines of metrics.jsonl (step, loss).

    Returns:
        None where nothing was trained or too few lines were logged (five in the second half) to tell; False for a loss
        that ended in NaN or infinity.
    """
    lines = [(line["step"], float(line["loss"])) for line in metrics if line["step"]]
    if not lines:
        return None
    step, loss = np.array(lines).T
    late = step > step.max() / 2
    if not np.isfinite(loss[late]).all():
        return False
    if late.sum() < _FEWEST:
        return None
    if (loss[late] <= 0).any():
        return True  # nothing is left to learn
    x, y = np.log(step[late]), np.log(loss[late])
    x = x - x.mean()
    slope = (x * y).sum() / (x**2).sum()
    rest = y - y.mean() - slope * x
    error = np.sqrt((rest**2).sum() / (len(x) - 2) / (x**2).sum())
    return not (1 - 2**slope > GAIN and slope < -error)
