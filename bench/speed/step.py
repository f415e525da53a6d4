"""One denoise step of a model of published shape with random weights: window forward, head, confidence, unmask.

A random model takes the same time as a trained one, because every step computes the same shapes and the state is put
back after each step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dlm_fast
from dlm_fast import Ops
from dlm_fast.decoding.plan import open_rows
from dlm_fast.decoding.step import denoise_step, open_decode
from dlm_fast.draws import sampling_of
from dlm_fast.patching import attach
from dlm_fast.requests import Requests
from dlm_kernels import RowState
from dlm_kernels.state import DENOISE

from .. import floors
from ..checks.decode import FAMILIES
from ..shapes import Model, Shapes
from ..timing import Candidate
from .run import OURS, Bench, Shape, Work

# transformers' SDPA under another name. For the names that transformers knows, it makes masks, and a dense mask where a
# graph is captured. The published loops have no mask: every position sees the whole canvas.
UNMASKED_SDPA = "bench_sdpa"
AttentionInterface.register(UNMASKED_SDPA, sdpa_attention_forward)
PUBLISHED = "whole canvas, no cache, launched by the host"  # a candidate that the gates look for by name
FEWER_LAYERS = "layers: no more fit in this GPU's memory"
PRESET_OF = {"full": "fast-dllm-dual", "block": "llada2"}


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """Dense models only. A mixture of experts is bound by which experts its tokens choose, and with random weights they
    choose at random."""
    for model in chosen.models:
        if model.family is None:
            continue
        built: dict[str, nn.Module] = {}  # the weights are shared by all shapes of a model
        for B, prefix in chosen.steps:
            cost, facts = floors.step(model, B, prefix), {"kind": "step", "B": B, "prefix": prefix, "W": model.window}
            label = f"step B={B} prefix={prefix} window={model.window}"
            yield Shape(
                "step", model.name, label, partial(_step, bench, ops, model, B, prefix, built), cost, facts, seconds=20
            )
        built.clear()


def random_model(model: Model, device: torch.device) -> tuple[nn.Module, str]:
    """A model in bfloat16 (float32 on a CPU) with as many layers as fit next to what a step needs; and a note if these
    are fewer than the published model has."""
    layers, note = model.layers, ""
    if device.type == "cuda":
        per_layer = 2 * model.hidden * (2 * (model.heads + model.kv_heads) * model.head_dim + 3 * model.intermediate)
        outside = 2 * 2 * model.vocab * model.hidden + (8 << 30)
        fit = int((torch.cuda.mem_get_info(device)[0] * 0.9 - outside) // per_layer)
        if fit < layers:
            layers, note = fit, f"{fit} of {model.layers} {FEWER_LAYERS}"
        if layers < 1:
            raise RuntimeError("not one layer fits in this GPU's memory")
    config_class, model_class = FAMILIES[model.family]
    config = config_class(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=model.eos_id,
    )
    config._attn_implementation = UNMASKED_SDPA
    with _default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32), device:
        built = model_class(config).eval()
    for module in built.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # what SDPA goes by without a mask
    return built.requires_grad_(False), note


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _step(bench: Bench, ops: Ops, model: Model, B: int, prefix: int, built: dict[str, nn.Module]) -> Work:
    device = bench.device
    if "model" not in built:
        built["model"], built["note"] = random_model(model, device)
    weights = built["model"]
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=model.mask_id,
        eos_token_ids=(model.eos_id,),
        visibility=model.visibility,
        block_length=model.window,
        block_alignment="abs",
    )
    preset = dataclasses.replace(dlm_fast.PRESETS[PRESET_OF[model.visibility]], block_length=model.window)
    canvas = torch.cat([torch.randint(10, model.vocab // 2, (prefix,)), torch.full((model.window,), model.mask_id)])
    plan, opened = open_rows([canvas] * B, preset, diffusion, device)
    opened.phase.fill_(DENOISE)  # the prefix is in the cache: random numbers

    batch = Requests(
        canvases=[canvas] * B,
        opened=[canvas] * B,
        prompt_lengths=[prefix] * B,
        min_new_tokens=[0] * B,
        temperature=[0.0] * B,
        top_k=0,
        top_p=1.0,
        seeds=[0] * B,
        request_ids=[0] * B,
        stop_strings=[None] * B,
        banned_token_ids=(),
        eos_token_ids=(model.eos_id,),
    )
    sampling = sampling_of(batch, plan, device)

    cached: list[tuple[Tensor, Tensor]] = []  # one cache for all candidates: several would not fit at large batches

    def ours(name: str, ops: Ops, graph: bool) -> Candidate:
        handle = attach(_share(weights), backend=ops, diffusion=diffusion, plain_mode=model.visibility)
        state = opened.clone()
        decode = open_decode(handle, plan, state, sampling)
        for number, layer in enumerate(decode.forward.cache.layers):
            if number == len(cached):
                cached.append((layer.keys.normal_(), layer.values.normal_()))
            layer.keys, layer.values = cached[number]

        bucket = plan.bucket("denoise")

        def call() -> None:
            with torch.no_grad():
                denoise_step(decode, bucket)

        return Candidate(name, [call], graph=graph, before=partial(_restore, state, opened))

    published = opened.tokens.clone()

    def loop() -> None:
        with torch.no_grad():
            _published_step(weights, published, model.mask_id)

    def restore() -> None:
        published.copy_(opened.tokens)

    candidates = [
        ours(OURS, ops, True),
        ours("ours, launched by the host", ops, False),
        ours("reference ops, in a graph", dlm_fast.REFERENCE, True),
        Candidate("whole canvas, no cache, in a graph", [loop], before=restore),
        Candidate(PUBLISHED, [loop], graph=False, before=restore),
    ]
    cost = floors.step(model, B, prefix, weights.config.num_hidden_layers)
    note = "; ".join(
        filter(
            None,
            [
                built["note"],
                "random weights",
                "no compiled model among the baselines: compiling one does not fit the time",
            ],
        )
    )
    return Work(candidates, cost, 1, True, note)


def _share(model: nn.Module) -> nn.Module:
    """Another instance over the parameters of the same model."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def _restore(state: RowState, opened: RowState) -> None:
    for field in dataclasses.fields(RowState):
        getattr(state, field.name).copy_(getattr(opened, field.name))


def _published_step(model: nn.Module, tokens: Tensor, mask_id: int) -> None:
    """One step of the published uncached loop (LLaDA, arXiv:2502.09992): a forward of the whole canvas, the most
    confident mask written."""
    logits = model(input_ids=tokens, use_cache=False).logits
    token = logits.argmax(-1)
    probability = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
    masked = tokens == mask_id
    best = torch.where(masked, probability, -torch.inf).argmax(1, keepdim=True)
    tokens.scatter_(1, best, token.gather(1, best))
