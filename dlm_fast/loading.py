"""Opening a checkpoint folder: safetensors only, native classes only, no remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from .diffusion import DiffusionConfig
from .models.native import MODEL_TYPES
from .ops import Ops
from .patching import attach

CHECKPOINTS = Path(__file__).parent / "checkpoints"
EMBEDDED = ("tiny-full", "tiny-isolated", "tiny-block")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A folder that cannot be opened as a checkpoint; the message names the file and the rule."""


def checkpoint_path(name_or_path: str | Path) -> Path:
    """The folder of an embedded model (`EMBEDDED`) or of a checkpoint on disk."""
    path = Path(name_or_path)
    if str(name_or_path) in EMBEDDED and not path.exists():
        path = CHECKPOINTS / str(name_or_path)
    if not path.is_dir():
        raise CheckpointError(f"load: path must be a checkpoint folder or one of {', '.join(EMBEDDED)}, got {str(name_or_path)!r}")
    return path


def check_weights(path: Path) -> None:
    """Raises CheckpointError unless the folder holds safetensors weights whose headers and lengths are intact."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"load: {path} has no config.json")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"load: {path / 'config.json'} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"load: {path / 'config.json'} must hold a JSON object, got a {type(config).__name__}")
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"load: {index} is not a safetensors index: {error!r}") from error
    if not files:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        found = f"; it has {', '.join(pickles)}, and pickle checkpoints are never opened: convert them to safetensors" if pickles else ""
        raise CheckpointError(f"load: {path} has no *.safetensors weights{found}")
    for file in files:
        try:
            # Opening validates the header and that the file is exactly as long as the header says.
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"load: {file} is not a readable safetensors file: {error}") from error


def load_tokenizer(path: str | Path) -> Any:
    """The folder's tokenizer, or None where it ships none. No remote code."""
    path = checkpoint_path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"load: the tokenizer of {path} cannot be read: {error}") from error


def load(
    path: str | Path,
    *,
    diffusion: DiffusionConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | Ops = "auto",
    rope_scale: float = 1.0,
) -> nn.Module:
    """Opens a checkpoint folder as a native transformers model that decodes by diffusion.

    The model also answers a plain `model(input_ids, attention_mask=...)`, with its family's own visibility
    (bidirectional, with or without an isolated prompt, or block-causal), never causal. Its `PatchHandle`, with the tokenizer, is `handle_of(model)`.

    Args:
        path: a folder (config.json, *.safetensors, tokenizer.json), or the name of an embedded model, e.g. "tiny-full" (`EMBEDDED`).
        diffusion: default: the `dlm` section of config.json.
        dtype: of the weights; default: as stored. device: default: "cuda" if there is one, else "cpu".
        backend: "auto", "triton", "reference" or an `Ops`.
        rope_scale: multiplies the base of the rotary positions, to decode contexts longer than the model was trained on: for LLaDA 4
            at 8k tokens, 14 at 16k, 31 at 24k, 55 at 32k (LongLLaDA, arXiv:2506.14429). max_position_embeddings is raised with it.
    Raises:
        ValueError: rope_scale below 1. CheckpointError: no folder, no safetensors, pickle weights, a corrupted file, missing or unexpected weights, no
            diffusion configuration. NotImplementedError: an architecture without an adapter, a GPU or a head size
            that the Triton kernels do not have, where they are the backend.
    """
    if not isinstance(rope_scale, (int, float)) or isinstance(rope_scale, bool) or not 1 <= rope_scale < float("inf"):
        raise ValueError(f"load: rope_scale must be a finite number >= 1, got rope_scale={rope_scale!r}")
    path = checkpoint_path(path)
    check_weights(path)
    config_type = json.loads((path / "config.json").read_text()).get("model_type")
    if config_type not in MODEL_TYPES:
        raise NotImplementedError(f"load: unsupported model_type {config_type!r} in {path}; supported are {', '.join(MODEL_TYPES)}")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if rope_scale != 1:
        config.rope_parameters["rope_theta"] *= rope_scale
        config.max_position_embeddings = int(config.max_position_embeddings * rope_scale)
    if diffusion is None:
        section = getattr(config, "dlm", None)
        if section is None:
            raise CheckpointError(
                f"load: {path / 'config.json'} has no 'dlm' section (mask_token_id, eos_token_ids, visibility, ...); "
                "pass diffusion=DiffusionConfig(...)"
            )
        diffusion = DiffusionConfig.from_dict(section)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, report = MODEL_TYPES[config_type].from_pretrained(
        path,
        config=config,
        dtype=dtype if dtype is not None else "auto",
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # reported below, by name, instead of in a table on stderr
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(f"load: {path} has {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:8]}")
    model = model.to(device).eval()
    handle = attach(model, backend=backend, diffusion=diffusion, plain_mode=diffusion.plain_mode)
    handle.tokenizer = load_tokenizer(path)
    return model
