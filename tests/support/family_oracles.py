"""Forward passes of the published architectures in float64, from the published tensors under their published names.

Written from the architectures' descriptions: pre-norm decoders with RMSNorm, rotary positions, grouped-query attention
and SwiGLU, dense or with experts. No module of transformers or of the project is called. Who sees whom is a row of
numbers, one for each position: a position sees another one if the number of the other is not larger.

    block = None                     every position sees every position
    block = [0, 0, 0, 1, 1, 2]       two blocks of three and two positions, and a third: block-causal
    block = [0, 1, 2, 3, 4, 5]       causal
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from oracles import KeysValues
from published import Published
from torch import Tensor

# The published names, by what the tensors do. `layer` goes before the names of a block.
NATIVE = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "attention norm": "input_layernorm",
    "mlp norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q norm": "self_attn.q_norm",
    "k norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LLADA = {
    "embedding": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.",
    "attention norm": "attn_norm",
    "mlp norm": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
LLADA2 = {
    **NATIVE,
    "embedding": "model.word_embeddings",
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "q norm": "attention.query_layernorm",
    "k norm": "attention.key_layernorm",
}


def _placed(root: str, head: str) -> dict[str, str]:
    """Native names of the blocks under another root."""
    places = {"embedding": f"{root}.embed_tokens", "norm": f"{root}.norm", "layer": root + ".layers.{}."}
    return {**NATIVE, **places, "head": head}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What distinguishes one decoder from another.

    Attributes:
        names: published names by what the tensors do.
        frequencies: rotary frequencies [rotated / 2]; a head's first `rotated` numbers turn, as (first half, second
            half) pairs.
        rotary_scale: a factor of the rotation's cosines and sines (yarn).
        query_scale: position -> a factor of the rotated query (Ministral 3).
        router: scores and choice of the experts; None = no layer has experts.
        dense: the layers without experts, where there is a router.
    """

    names: dict[str, str]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    frequencies: Tensor
    rotary_scale: float = 1.0
    query_scale: Callable[[Tensor], Tensor] = torch.ones_like
    router: Callable[[Tensor, Tensor | None], Choice] | None = None
    dense: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts of one layer.

    Attributes:
        experts: ids [L, k], the best first.
        weights: factor of each chosen expert's output [L, k].
        margin: what would have to change in a score for another choice [L]: the distance between the last that was
            chosen and the first that was not, of experts and of groups of experts.
    """

    experts: Tensor
    weights: Tensor
    margin: Tensor


def logits(published: Published, input_ids: Sequence[int] | Tensor, block: Tensor | None = None) -> Tensor:
    """Logits [L, V] in float64, each row that of its own position."""
    return Network(published).sequence(input_ids, block)[0]


def routes(published: Published, input_ids: Sequence[int] | Tensor, block: Tensor | None = None) -> dict[int, Choice]:
    """The experts of every layer that has some."""
    return Network(published).sequence(input_ids, block)[2]


def blocks(published: Published, length: int, start: int) -> Tensor | None:
    """Who sees whom in a sequence of `length` whose prompt ends at `start`, by the family's facts.

    With a causal prefix `start` is where the block in work begins: the prompt and the committed blocks before it are
    seen causally.
    """
    positions = torch.arange(length)
    if published.visibility == "full":
        return None
    size = published.block_length
    if published.alignment == "abs":
        return positions // size
    later = start + (positions - start) // size
    return torch.where(positions < start, positions if published.causal_prefix else start - 1, later)


class Network:
    """The forward of a checkpoint, given by who sees whom, as the transcriptions of decoders want it
    (oracles.Network)."""

    def __init__(self, published: Published) -> None:
        self.form = _architecture(published)
        self.weights = {name: tensor.double() for name, tensor in published.tensors.items()}

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        visible: Tensor,
        stale: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Logits [T, V] of T tokens, and their keys and values [H_kv, T, D] of every layer; visible [T, S + T]: whether
        a token sees each of the S stale positions and then each of the T tokens."""
        return self._run(torch.as_tensor(tokens), torch.as_tensor(positions), visible, stale)[:2]

    def sequence(
        self, input_ids: Sequence[int] | Tensor, block: Tensor | None
    ) -> tuple[Tensor, KeysValues, dict[int, Choice]]:
        """Logits, keys and values, and experts of a whole sequence; position q sees k iff block[k] <= block[q]."""
        ids = torch.as_tensor(input_ids)
        visible = torch.ones(len(ids), len(ids), dtype=torch.bool)
        if block is not None:
            visible = torch.as_tensor(block)[None, :] <= torch.as_tensor(block)[:, None]
        return self._run(ids, torch.arange(len(ids)), visible, None)

    def _run(
        self, ids: Tensor, positions: Tensor, visible: Tensor, stale: KeysValues | None
    ) -> tuple[Tensor, KeysValues, dict[int, Choice]]:
        form, names, weights = self.form, self.form.names, self.weights
        x = weights[names["embedding"] + ".weight"][ids]
        stored: KeysValues = []
        choices: dict[int, Choice] = {}
        for layer in range(form.layers):
            prefix = names["layer"].format(layer)
            y = self._normed(x, prefix + names["attention norm"])
            if "qkv" in names:
                widths = [form.heads * form.head_dim, form.kv_heads * form.head_dim, form.kv_heads * form.head_dim]
                q, k, v = self._linear(y, prefix + names["qkv"]).split(widths, -1)
            else:
                q, k, v = (self._linear(y, prefix + names[part]) for part in "qkv")
            q, k, v = (part.unflatten(-1, (-1, form.head_dim)) for part in (q, k, v))
            if prefix + names.get("q norm", "") + ".weight" in weights:
                q, k = self._normed(q, prefix + names["q norm"]), self._normed(k, prefix + names["k norm"])
            q, k = _rotated(form, q, positions, query=True), _rotated(form, k, positions)
            stored.append((k.transpose(0, 1), v.transpose(0, 1)))
            if stale is not None:
                k = torch.cat([stale[layer][0].transpose(0, 1), k])
                v = torch.cat([stale[layer][1].transpose(0, 1), v])
            x = x + self._linear(_attend(form, q, k, v, visible), prefix + names["o"])

            y = self._normed(x, prefix + names["mlp norm"])
            if form.router is None or layer in form.dense:
                x = x + self._swiglu(y, *(prefix + names[part] for part in ("gate", "up", "down")))
                continue
            bias = weights.get(prefix + "mlp.gate.expert_bias")
            choices[layer] = form.router(self._linear(y, prefix + "mlp.gate"), bias)
            x = x + self._mixed(y, choices[layer], prefix)
        x = self._normed(x, names["norm"])
        head = names["head"] if names["head"] + ".weight" in weights else names["embedding"]
        return self._linear(x, head), stored, choices

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.form.eps).sqrt() * self.weights[name + ".weight"]

    def _swiglu(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        opened = self._linear(x, gate)
        return self._linear(opened * torch.sigmoid(opened) * self._linear(x, up), down)

    def _expert(self, x: Tensor, prefix: str) -> Tensor:
        return self._swiglu(x, prefix + "gate_proj", prefix + "up_proj", prefix + "down_proj")

    def _mixed(self, y: Tensor, choice: Choice, prefix: str) -> Tensor:
        """The chosen experts' outputs, weighted, and the shared expert's where there is one."""
        mixed = torch.zeros_like(y)
        for position, (experts, factors) in enumerate(zip(choice.experts.tolist(), choice.weights)):
            for number, factor in zip(experts, factors):
                mixed[position] += factor * self._expert(y[position], f"{prefix}mlp.experts.{number}.")
        if prefix + "mlp.shared_experts.gate_proj.weight" in self.weights:
            mixed += self._expert(y, prefix + "mlp.shared_experts.")
        return mixed


def _rotated(form: Architecture, x: Tensor, positions: Tensor, query: bool = False) -> Tensor:
    """[L, heads, D] with the first part of every head turned by its position's angles."""
    positions = positions.double()
    angles = (positions[:, None] * form.frequencies)[:, None, :]
    cos, sin = angles.cos() * form.rotary_scale, angles.sin() * form.rotary_scale
    half = form.frequencies.numel()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return turned * form.query_scale(positions)[:, None, None] if query else turned


def _attend(form: Architecture, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v over what is seen, every group of query heads with one key head: [L, heads * D]."""
    out = []
    for head in range(form.heads):
        shared = head * form.kv_heads // form.heads
        scores = q[:, head] @ k[:, shared].T / math.sqrt(form.head_dim)
        out.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, shared])
    return torch.cat(out, -1)


def _softmax_router(k: int, normalized: bool) -> Callable[[Tensor, Tensor | None], Choice]:
    """The probabilities of the k most probable experts, divided by their sum where `normalized` (Qwen3-MoE)."""

    def route(scores: Tensor, bias: Tensor | None) -> Choice:
        probabilities = scores.softmax(-1)
        ranked, order = probabilities.sort(-1, descending=True)
        chosen = ranked[:, :k]
        factors = chosen / chosen.sum(-1, keepdim=True) if normalized else chosen
        return Choice(order[:, :k], factors, ranked[:, k - 1] - ranked[:, k])

    return route


def _sigmoid_router(k: int, groups: int, kept: int, scale: float) -> Callable[[Tensor, Tensor | None], Choice]:
    """LLaDA2's router. The bias counts in the choice and not in the weights.

    Groups are ranked by the sum of their two best experts; the k best experts of the `kept` best groups are chosen, and
    their sigmoids, divided by their sum and scaled, weigh them.
    """

    def route(scores: Tensor, bias: Tensor | None) -> Choice:
        sigmoids = scores.sigmoid()
        ranks = sigmoids + bias
        by_group = ranks.unflatten(-1, (groups, -1))
        totals = by_group.sort(-1, descending=True).values[..., :2].sum(-1)
        ranked, order = totals.sort(-1, descending=True)
        margin = ranked[:, kept - 1] - ranked[:, kept] if kept < groups else torch.full_like(ranked[:, 0], math.inf)
        open_groups = torch.zeros_like(totals, dtype=torch.bool).scatter(1, order[:, :kept], True)
        ranks = by_group.masked_fill(~open_groups[..., None], -math.inf).flatten(1)
        ranked, order = ranks.sort(-1, descending=True)
        factors = sigmoids.gather(1, order[:, :k])
        factors = scale * factors / (factors.sum(-1, keepdim=True) + 1e-20)
        return Choice(order[:, :k], factors, torch.minimum(margin, ranked[:, k - 1] - ranked[:, k]))

    return route


def _frequencies(width: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def _llada(config: dict[str, Any]) -> Architecture:
    head_dim = config["d_model"] // config["n_heads"]
    return Architecture(
        names=LLADA,
        layers=config["n_layers"],
        heads=config["n_heads"],
        kv_heads=config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else config["n_heads"]),
        head_dim=head_dim,
        eps=config["rms_norm_eps"],
        frequencies=_frequencies(head_dim, config["rope_theta"]),
    )


def _native(config: dict[str, Any], **changes: Any) -> Architecture:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = {
        "names": NATIVE,
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": head_dim,
        "eps": config["rms_norm_eps"],
    }
    if "frequencies" not in changes:
        values["frequencies"] = _frequencies(head_dim, config["rope_theta"])
    return Architecture(**{**values, **changes})


def _llada2(config: dict[str, Any]) -> Architecture:
    width = int(config["head_dim"] * config["partial_rotary_factor"])
    return _native(
        config,
        names=LLADA2,
        frequencies=_frequencies(width, config["rope_theta"]),
        router=_sigmoid_router(
            config["num_experts_per_tok"],
            config["n_group"],
            config["topk_group"],
            config["routed_scaling_factor"],
        ),
        dense=frozenset(range(config["first_k_dense_replace"])),
    )


def _qwen_moe(config: dict[str, Any]) -> Architecture:
    """Qwen3-MoE: the weights are divided by their sum where the configuration says so."""
    router = _softmax_router(config["num_experts_per_tok"], config["norm_topk_prob"])
    return _native(config, router=router, dense=frozenset(config["mlp_only_layers"]))


def _llada_moe(config: dict[str, Any]) -> Architecture:
    """The weights are never divided by their sum, whatever the configuration says."""
    dense = (layer for layer, sparse in enumerate(config["moe_layer_freq"]) if not sparse)
    return _native(config, router=_softmax_router(config["num_experts_per_tok"], False), dense=frozenset(dense))


def _nemotron(config: dict[str, Any], names: dict[str, str]) -> Architecture:
    """Ministral 3: yarn, and queries that grow with the logarithm of the position.

    yarn: a frequency that turns more than beta_fast times within the original length stays; one that turns less than
    beta_slow times is divided by the factor; between the two, by index, a straight line leads from one to the other.
    """
    rope, width = config["rope_parameters"], config["head_dim"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]

    def index(turns: float) -> float:
        """Index, in numbers of a head, of the frequency that makes so many turns within the original length."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(index(rope["beta_fast"])), 0)
    high = min(math.ceil(index(rope["beta_slow"])), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = _frequencies(width, rope["rope_theta"])
    growth = [0.1 * rope[name] * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")]
    return _native(
        config,
        names=names,
        frequencies=frequencies * (1 - ramp) + frequencies / factor * ramp,
        rotary_scale=growth[0] / growth[1],
        query_scale=lambda positions: 1 + rope["llama_4_scaling_beta"] * (1 + (positions / original).floor()).log(),
    )


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Architecture]] = {
    "llada": _llada,
    "llada2": _llada2,
    "llada-moe": _llada_moe,
    "llada-llama": _native,
    "dream": _native,
    "sdar": _native,
    "sdar-moe": _qwen_moe,
    "fast-dllm-v2": _native,
    "nemotron": partial(_nemotron, names=_placed("encoder", "diffusion_head")),
    "nemotron-language-model": partial(_nemotron, names=_placed("language_model.model", "language_model.lm_head")),
    "efficient-dlm": partial(_native, names=_placed("encoder", "diffusion_head")),
    "stable-diffcoder": _native,
    "a2d-qwen3": _native,
    "a2d-qwen2": _native,
    "a2d-llama": _native,
    "rnd1": _qwen_moe,
}


def _architecture(published: Published) -> Architecture:
    return ARCHITECTURES[published.family](published.config)
