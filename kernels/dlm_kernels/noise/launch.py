"""`uniform_scores`, one launch. Specification: reference.noise.uniform_scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import device
from ..checks.noise import check_noise
from ..library import operator
from ..plans import Calls, Launch, Plan
from ..tiles import NOISE_TILE
from .kernel import uniform_scores_kernel

# The tensors of a launch.
_NAMES = ("seed_ptr", "noise_ptr", "score_ptr")
_calls = Calls("uniform_scores", _NAMES)


def _scores(seed: Tensor, noise: Tensor) -> Tensor:
    return torch.empty(noise.shape[0], dtype=torch.float32, device=noise.device)


@operator(fake=_scores)
def uniform_scores(seed: Tensor, noise: Tensor) -> Tensor:
    """[N] fp32 in (0, 1): one number for every counter [N, 3] int32 (request, position, step), under a seed [1] int64
    of all counters or [N] with one for each.

    The result equals that of reference.noise.uniform_scores bit for bit, where the numbers are described. Traffic: 12 B
    read (20 B with a seed for each) and 4 B written a number.

    Raises:
        TypeError: dtype.  ValueError: shape, device, a tensor that is not contiguous.  RuntimeError: CPU tensors
        without Triton's interpreter.  NotImplementedError: a GPU that `tiles.TARGETS` does not name.
    """
    call, key, tensors, pointers = _calls.find((seed, noise), ())
    if call is None or not call.accepts(tensors, ()):
        check_noise(seed, noise)
        if call is None:
            call = _calls.add(key)
        call.accepted(())
    score = _scores(seed, noise)
    N = score.shape[0]
    if N == 0:
        return score
    device.capability_of("uniform_scores", noise, uniform_scores_kernel)
    plan = call.plan_for((uniform_scores_kernel,))
    if plan is None:
        BLOCK_N, num_warps = NOISE_TILE
        values = {
            "seed_stride": int(seed.shape[0] > 1),
            "N": N,
            "BLOCK_N": BLOCK_N,
            "num_warps": num_warps,
            "num_stages": 1,
        }
        places = {name: place for place, name in enumerate(_NAMES)}
        plan = Plan([Launch(uniform_scores_kernel, (-(-N // BLOCK_N),), _NAMES, places, values)])
        call.plan = (uniform_scores_kernel,), plan
    plan.run(noise, tensors, (score,), pointers)
    return score
