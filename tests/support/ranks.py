"""Decodes of tensor parallel models, in processes that torchrun starts.

    torchrun --nproc-per-node 2 tests/support/ranks.py FOLDER

Each rank decodes every case, tries what is refused, and writes what it found to FOLDER/rank-<number>.pt. Then rank 1
fails in the middle of a decode, which must end the other rank too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import dlm_fast
from dlm_fast.decoding import memory

FAILURE = "rank 1 fails"
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
FULL = dlm_fast.DiffusionConfig(mask_token_id=0, eos_token_ids=(1,), visibility="full")
BLOCK = dataclasses.replace(FULL, visibility="block", block_length=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode.

    Attributes:
        folder: the checkpoint, below the folder of the run.
        diffusion: how the model is decoded, for `patch`; None = the checkpoint says so, for `load`.
        preset: the decoder.
        options: further options of `generate`.
    """

    folder: str
    diffusion: dlm_fast.DiffusionConfig | None
    preset: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "no cache": Case("llama", FULL, "llada", {"block_length": 4}),
    "prefix": Case("llama", FULL, "fast-dllm-prefix", {"block_length": 4}),
    "dual": Case("llama", FULL, "fast-dllm-dual", {"block_length": 4}),
    "sampled": Case("llama", FULL, "fast-dllm-dual", {"block_length": 4, "temperature": 0.7, "seed": 3}),
    "biases": Case("qwen2", FULL, "fast-dllm-prefix", {"block_length": 4}),
    "d2f": Case("llama", BLOCK, "d2f", {"threshold": 0.3}),
    "sdar": Case("qwen3", BLOCK, "sdar"),
    "sdar sampled": Case("qwen3", BLOCK, "sdar", {"temperature": 0.7, "seed": 3}),
    "loaded": Case("published-llada", None, "fast-dllm-dual", {"block_length": 4}),
    "experts": Case("published-llada2", None, "llada2", {"block_length": 4, "threshold": 0.3}),
    "tied head": Case("published-sdar", None, "sdar"),
}


def opened(root: Path, case: Case, spread: bool, **options: Any) -> nn.Module:
    """The model of a case, over all ranks or in this process alone."""
    folder = root / case.folder
    if case.diffusion is None:
        place = {"tp_plan": "auto"} if spread else {"device": "cpu"}
        return dlm_fast.load(folder, **place, **options)
    place = {"distributed_config": DistributedConfig(tp_plan="auto")} if spread else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
    dlm_fast.patch(model, diffusion=case.diffusion, **options)
    return model


def decode(model: nn.Module, case: Case) -> dict[str, Any]:
    """What a decode gives, a digest of all logits that it saw among that."""
    digest = hashlib.sha256()

    def note(module: nn.Module, arguments: Any, logits: torch.Tensor) -> None:
        assert type(logits) is torch.Tensor and logits.shape[-1] == model.config.vocab_size
        digest.update(logits.numpy().tobytes())

    hook = model.lm_head.register_forward_hook(note)
    out = dlm_fast.generate(model, PROMPTS, preset=case.preset, max_new_tokens=12, **case.options)
    hook.remove()
    handle = dlm_fast.handle_of(model)
    return {
        "canvas": torch.cat(out.canvas).tolist(),
        "steps": torch.cat(out.unmask_step).tolist(),
        "confidence": torch.cat(out.confidence),
        "nfe": out.nfe,
        "logits": digest.hexdigest(),
        "layers": dlm_fast.explain(model)["layers"],
        "ranks": dlm_fast.explain(model)["ranks"],
        "heads": handle.adapter.new_cache(model, 1, 4).layers[0].keys.shape[1],
    }


def refused(call: Callable[[], Any]) -> str:
    """What a call is refused with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "was taken"


def batch_too_large(model: nn.Module, rank: int) -> str:
    """What a decode is refused with where rank 1 alone has no memory left."""
    free, small = memory.free_bytes, memory.SMALL
    try:
        memory.SMALL, memory.free_bytes = 0, lambda device: 2**40 * (1 - rank)
        return refused(lambda: dlm_fast.generate(model, PROMPTS, preset="llada", block_length=4, max_new_tokens=12))
    finally:
        memory.free_bytes, memory.SMALL = free, small


def cached_bytes(model: nn.Module) -> list[int]:
    """What the refusal of a batch counts for keys and values."""
    counted = []

    def noted(*arguments: Any) -> Any:
        parts = step_parts(*arguments)
        counted.extend(taken["keys and values"] for taken in parts.values())
        return parts

    step_parts, small = memory.step_parts, memory.SMALL
    try:
        memory.SMALL, memory.step_parts = 0, noted
        dlm_fast.generate(model, PROMPTS, preset="fast-dllm-dual", block_length=4, max_new_tokens=12)
    finally:
        memory.step_parts, memory.SMALL = step_parts, small
    return counted


def shared_work(model: nn.Module) -> list[int]:
    """Positions that a session computes for a prompt, for the same one again, and after a step of an optimizer."""
    session = dlm_fast.Session(
        model, slots=2, max_positions=64, max_new_tokens=4, share_prefixes=True, page_size=32, preset="sdar"
    )
    prompt, found = [5 + i % 40 for i in range(45)], []
    for _ in range(2):
        found.append(session.generate([prompt])[0].query_tokens)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.0).step()
    return [*found, session.generate([prompt])[0].query_tokens]


def decode_all(root: Path, rank: int) -> dict[str, Any]:
    """Every case, and what is not taken."""
    found: dict[str, Any] = {"cases": {}}
    for name, case in CASES.items():
        found["cases"][name] = decode(opened(root, case, spread=True), case)
    case = CASES["dual"]
    found["unfused"] = decode(opened(root, case, spread=True, fuse_layers=False), case)
    found["shared"] = shared_work(opened(root, CASES["sdar"], spread=True))
    model = opened(root, case, spread=True)
    found["keys and values"] = cached_bytes(model)
    found["too large"] = batch_too_large(model, rank)
    found["with gradients"] = model(torch.tensor(PROMPTS[1:])).logits.detach()
    one_head = Case("one-head", FULL, "llada")
    found["one head, patched"] = refused(lambda: opened(root, one_head, spread=True))
    found["one head, loaded"] = refused(lambda: dlm_fast.load(root / "one-head", tp_plan="auto"))
    for name, plan in {
        "whole queries": {"model.layers.*.self_attn.q_proj": "colwise_rep"},
        "head in shares": {"lm_head": "colwise"},
    }.items():
        config = DistributedConfig(tp_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(root / "llama", dtype=torch.float32, distributed_config=config)
        found[name] = refused(lambda model=model: dlm_fast.patch(model, diffusion=FULL))
    return found


def fail(root: Path, rank: int) -> None:
    """A decode in which rank 1 fails, and rank 0 waits for what rank 1 would have sent."""

    def raise_in_one(state: Any) -> None:
        if rank == 1:
            raise RuntimeError(FAILURE)

    case = CASES["no cache"]
    model = opened(root, case, spread=True)
    dlm_fast.generate(model, PROMPTS, preset=case.preset, max_new_tokens=12, on_step=raise_in_one, **case.options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    # A rank that waits gives up after a minute; one of a group that transformers made waits for two hours.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    torch.save(decode_all(root, rank), root / f"rank-{rank}.pt")
    torch.distributed.barrier()
    fail(root, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
