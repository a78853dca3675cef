"""Had a run learned what it could? The rule: its loss no longer fell over the last fifth of its steps.

    before = mean loss over steps (60 %, 80 %],   last = mean loss over steps (80 %, 100 %]
    not converged if last < 0.97 before and the fall is more than two standard errors of the difference

A comparison of Qs is about the budget of training as much as about Q where a run fails this; reports mark it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FALL = 0.03
_STANDARD_ERRORS = 2


def converged(metrics: Sequence[Mapping[str, Any]]) -> bool | None:
    """The rule on the lines of metrics.jsonl (step, loss).

    Returns:
        None where nothing was trained or too few lines were logged (two in each fifth) to tell; False for a loss that
        ended in NaN or infinity.
    """
    if not metrics:
        return None
    last_step = max(line["step"] for line in metrics)
    share = [(line["step"] / last_step, float(line["loss"])) for line in metrics if last_step]
    before = np.array([loss for at, loss in share if 0.6 < at <= 0.8])
    last = np.array([loss for at, loss in share if at > 0.8])
    if last.size and not np.isfinite(last).all():
        return False
    if min(before.size, last.size) < 2:
        return None
    fall = before.mean() - last.mean()
    error = math.sqrt(before.var(ddof=1) / before.size + last.var(ddof=1) / last.size)
    return not (fall > FALL * before.mean() and fall > _STANDARD_ERRORS * error)
