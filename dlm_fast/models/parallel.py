"""Models that transformers spreads over the processes of a group by its tensor parallel plan.

Every process, called a rank, runs the whole decode. It holds a share of the rows of the attention's projections, and so
computes and caches a share of the heads. The forwards that transformers gave the projections, the embedding and the
head sum or gather what the ranks made: hidden states and logits are the same bits on every rank, and all ranks decide
alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# What a plan may say of the modules on which the shape of keys and logits depends.
_STYLES = {
    "model.layers.*.self_attn.q_proj": ("colwise",),
    "model.layers.*.self_attn.k_proj": ("colwise",),
    "model.layers.*.self_attn.v_proj": ("colwise",),
    "model.layers.*.self_attn.o_proj": ("rowwise",),
    "lm_head": ("colwise_gather_output", "colwise_rep"),
}


def ranks_of(model: nn.Module) -> int:
    """The number of ranks over which transformers spread a model; 1 = the model is whole."""
    return getattr(model, "tp_size", None) or 1


def kv_heads(model: nn.Module) -> int:
    """The key/value heads that this process computes in every layer.

    A quantised weight has a shape of its own, and is never spread.
    """
    projection = model.model.layers[0].self_attn.k_proj
    return model.config.num_key_value_heads // _shares(projection)


def _shares(projection: nn.Module) -> int:
    """Into how many shares the rows of a projection are cut; 0 where the shares are not equal.

    The shape of the local tensor would say it too, but taking that tensor is an op, which FakeTensorMode refuses.
    """
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, DTensor):
        return 1
    sizes = [weight.device_mesh.size(axis) for axis, place in enumerate(weight.placements) if _cuts_rows(place, weight)]
    shares = math.prod(sizes)
    return 0 if weight.shape[0] % shares else shares


def _cuts_rows(place: Any, weight: DTensor) -> bool:
    """Whether a placement spreads the rows of a weight."""
    return getattr(place, "dim", None) in (0, -weight.dim())


def check_heads(owner: str, config: Any, ranks: int) -> None:
    """Raises ValueError unless every rank gets whole heads, and the key/value heads of its queries."""
    heads, of_keys = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks or of_keys % ranks:
        raise ValueError(
            f"{owner}: the number of ranks must divide the heads of a tensor parallel model, got {ranks} ranks for "
            f"num_attention_heads={heads} and num_key_value_heads={of_keys}"
        )


def verify(model: nn.Module) -> None:
    """Raises ValueError for a model whose heads its ranks do not divide, and NotImplementedError for one that is spread
    in a way that our attention or the decoder would take wrongly."""
    ranks = ranks_of(model)
    modules = [layer.self_attn for layer in model.model.layers]
    cut = [
        (index, name, _shares(getattr(module, name)))
        for index, module in enumerate(modules)
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    if ranks == 1 and all(shares == 1 for _, _, shares in cut):
        return
    if getattr(model.config, "quantization_config", None) is not None:
        raise NotImplementedError(
            f"dlm_fast: the weights of a tensor parallel model must not be quantised, got {ranks} ranks and "
            f"quantization_config={type(model.config.quantization_config).__name__}"
        )
    check_heads("dlm_fast", model.config, ranks)
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes != ranks:
        raise NotImplementedError(
            f"dlm_fast: a tensor parallel model must be spread over all processes of the group, got {ranks} ranks "
            f"(tp_size) of {processes} processes"
        )
    plan = getattr(model, "tp_plan", None) or {}
    for name, styles in _STYLES.items():
        if name in plan and plan[name] not in styles:
            raise NotImplementedError(
                f"dlm_fast: tp_plan must say {' or '.join(map(repr, styles))} of {name}, got {plan[name]!r}"
            )
    # Queries that are cut where keys are not would attend to other heads' keys.
    expected = cut[0][2] if cut[0][2] in (1, ranks) else ranks
    for index, name, shares in cut:
        if shares != expected:
            raise NotImplementedError(
                f"dlm_fast: the projections of all layers must be cut into {expected} equal shares, got "
                f"{shares or 'unequal'} of {name} in layer {index}"
            )


def least_of_ranks(model: nn.Module, numbers: list[int]) -> list[int]:
    """Of each number the least that a rank has, so that all ranks decide alike; every rank must call this."""
    if ranks_of(model) == 1:
        return numbers
    found = torch.tensor(numbers, dtype=torch.int64, device=next(model.parameters()).device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return found.tolist()
