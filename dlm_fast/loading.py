"""Opening a checkpoint folder: safetensors only, native classes only, no remote code, nothing read outside the
folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from .diffusion import DiffusionConfig, check_vocabulary
from .files import PICKLES, CheckpointError, checkpoint_path
from .models.native import MODEL_TYPES
from .ops import Ops
from .patching import attach

# What safetensors calls the dtypes that weights may have.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"load: {path} has no config.json")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"load: {path / 'config.json'} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"load: {path / 'config.json'} must hold a JSON object, got a {type(config).__name__}")
    return config


def weight_files(path: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists, which lie in the folder itself."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("weight_map must name files of this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"load: {index} is not a safetensors index: {error!r}") from error
        return [path / name for name in sorted(names)]
    if single.is_file():
        return [single]
    found = ""
    others = sorted(p.name for p in path.glob("*.safetensors"))
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if others:
        found = (
            f"; it has {', '.join(others)}, and weights are model.safetensors, or shards with a "
            "model.safetensors.index.json"
        )
    elif pickles:
        found = f"; it has {', '.join(pickles)}, and pickle checkpoints are never opened: convert them to safetensors"
    raise CheckpointError(f"load: {path} has no *.safetensors weights{found}")


def stored_dtypes(files: list[Path]) -> dict[str, str]:
    """The dtype of every tensor of safetensors files, as their headers name it. Raises CheckpointError unless all files
    are intact."""
    dtypes: dict[str, str] = {}
    for file in files:
        try:
            if not file.is_file():
                raise FileNotFoundError("no such file")
            # Opening validates the header and that the file is exactly as long as the header says.
            with safe_open(file, framework="pt") as weights:
                found = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"load: {file} is not a readable safetensors file: {error}") from error
        twice = sorted(found.keys() & dtypes.keys())
        if twice:
            raise CheckpointError(
                f"load: {file} holds tensors that another file of {file.parent} holds too: {twice[:8]}"
            )
        dtypes |= found
    return dtypes


def float_dtype(path: Path, dtypes: Mapping[str, str]) -> torch.dtype:
    """The one float dtype that weights are stored in. Raises CheckpointError where there are several or others."""
    example = float_kinds(path, dtypes)
    if len(example) > 1:
        got = ", ".join(f"{name} {kind}" for kind, name in sorted(example.items()))
        raise CheckpointError(
            f"load: the weights of {path} are stored in several dtypes ({got}); say which with dtype="
        )
    return FLOATS[next(iter(example), "F32")]


def float_kinds(path: Path, dtypes: Mapping[str, str]) -> dict[str, str]:
    """The float dtypes that weights are stored in, each with the first tensor of it. Raises CheckpointError where there
    are others."""
    wrong = [f"{name} {kind}" for name, kind in sorted(dtypes.items()) if kind not in FLOATS]
    if wrong:
        raise CheckpointError(
            f"load: the weights of {path} must be stored as {', '.join(FLOATS)}, got {', '.join(wrong[:4])} "
            f"({len(wrong)} of {len(dtypes)}); quantised weights are not converted"
        )
    # Old checkpoints store the rotary frequencies, which transformers computes: they are nobody's weights.
    return {
        kind: name for name, kind in sorted(dtypes.items(), reverse=True) if not name.endswith("rotary_emb.inv_freq")
    }


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of safetensors files."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}
    return tensors


def load_tokenizer(path: str | Path) -> Any:
    """The folder's tokenizer, or None where it ships none. No remote code."""
    path = checkpoint_path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"load: the tokenizer of {path} cannot be read: {error}") from error


def merge_adapter(model: nn.Module, path: Path) -> nn.Module:
    """The model with the LoRA adapter of a folder folded into its weights. Needs peft."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            rule = f"adapter must be a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
            raise CheckpointError(f"load: {rule}, got {str(path)!r} without {name}")
    stored = stored_dtypes([path / ADAPTER_WEIGHTS])
    float_dtype(path, stored)
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("load: an adapter needs peft: pip install 'dlm-fast[train]'", name="peft") from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, path, torch_device="cpu")
        expected = set(peft.get_peft_model_state_dict(adapted))
        if expected != stored.keys():
            raise ValueError(f"tensors missing or unknown: {sorted(expected ^ stored.keys())[:4]}")
        return adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise CheckpointError(f"load: the adapter of {path} cannot be merged: {error}") from error


def load(
    path: str | Path,
    *,
    diffusion: DiffusionConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | Ops = "auto",
    rope_scale: float = 1.0,
    adapter: str | Path | bool | None = None,
) -> nn.Module:
    """Opens a checkpoint folder as a native transformers model that decodes by diffusion.

    The model also answers a plain `model(input_ids, attention_mask=...)`, with its family's own visibility
    (bidirectional, with or without an isolated prompt, or block-causal), never causal. Its `PatchHandle`, with the
    tokenizer, is `handle_of(model)`.

    Args:
        path: a folder (config.json, *.safetensors, tokenizer.json), or the name of an embedded model, e.g. "tiny-full"
            (`EMBEDDED`).
        diffusion: default: the `dlm` section of config.json. Its mask must be the tokenizer's, where that has one.
        dtype: of the weights, a float of 16, 32 or 64 bits; default: as stored, whatever config.json says, and needed
            where they are stored in several. device: default: "cuda" if there is one, else "cpu".
        backend: "auto", "triton", "reference" or an `Ops`.
        rope_scale: multiplies the base of the rotary positions, to decode contexts longer than the model was trained
            on: for LLaDA 4 at 8k tokens, 14 at 16k, 31 at 24k, 55 at 32k (LongLLaDA, arXiv:2506.14429).
            max_position_embeddings is raised with it.
        adapter: a folder with a LoRA adapter, merged into the weights in float32 (peft does it). False: none. An
            adapter beside the weights in `path` is never applied unasked: one of the two must be said.
    Raises:
        ValueError: rope_scale below 1, ids outside the vocabulary, another mask than the tokenizer's. TypeError: dtype.
        CheckpointError: no folder, no safetensors, pickle weights, a corrupted file, weights that are missing,
        unexpected or no
            floats, a config.json that describes no model, no diffusion configuration, an adapter that is not asked for
            or does not fit.
        NotImplementedError: an architecture without an adapter of ours, a quantised checkpoint; a GPU or a head size
        that the
            Triton kernels do not have, where they are the backend.
    """
    if not isinstance(rope_scale, (int, float)) or isinstance(rope_scale, bool) or not 1 <= rope_scale < float("inf"):
        raise ValueError(f"load: rope_scale must be a finite number >= 1, got rope_scale={rope_scale!r}")
    if dtype is not None and dtype not in FLOATS.values():
        raise TypeError(
            f"load: dtype must be None (as stored) or one of {', '.join(map(str, FLOATS.values()))}, got "
            f"dtype={dtype!r}"
        )
    path = checkpoint_path(path)
    values = read_config(path)
    config_type = values.get("model_type")
    if not isinstance(config_type, str) or config_type not in MODEL_TYPES:
        raise NotImplementedError(
            f"load: unsupported model_type {config_type!r} in {path}; supported are {', '.join(MODEL_TYPES)}"
        )
    if values.get("quantization_config") is not None:
        raise NotImplementedError(
            f"load: quantised checkpoints are not supported, got quantization_config={values['quantization_config']!r} "
            f"in {path}; "
            "supported are float weights without one"
        )
    if adapter is None and (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"load: {path} holds an adapter ({ADAPTER_CONFIG}), which is applied on request only; "
            f"say adapter={str(path)!r} to merge it, or adapter=False to open the weights alone"
        )
    if adapter is not None and adapter is not False and (not isinstance(adapter, (str, Path)) or adapter == ""):
        raise TypeError(f"load: adapter must be a folder, False or None, got adapter={adapter!r}")
    files = weight_files(path)
    stored = stored_dtypes(files)
    if (path / "model.safetensors").is_file() and path / "model.safetensors" not in files:
        raise CheckpointError(
            f"load: {path} has both model.safetensors and a model.safetensors.index.json of other files; keep one of "
            "the two"
        )
    dtype = dtype if dtype is not None and set(stored.values()) <= FLOATS.keys() else float_dtype(path, stored)
    family = MODEL_TYPES[config_type]
    try:
        config = family.config_class.from_pretrained(path, local_files_only=True)
        if rope_scale != 1:
            config.rope_parameters["rope_theta"] *= rope_scale
            config.max_position_embeddings = int(config.max_position_embeddings * rope_scale)
    except Exception as error:
        raise CheckpointError(f"load: {path / 'config.json'} describes no {config_type} model: {error!r}") from error
    if diffusion is None:
        section = getattr(config, "dlm", None)
        if section is None:
            raise CheckpointError(
                f"load: {path / 'config.json'} has no 'dlm' section (mask_token_id, eos_token_ids, visibility, ...); "
                "pass diffusion=DiffusionConfig(...)"
            )
        diffusion = DiffusionConfig.from_dict(section)
    check_vocabulary(diffusion, config.vocab_size)
    tokenizer = load_tokenizer(path)
    mask_id = getattr(tokenizer, "mask_token_id", None)
    if mask_id is not None and mask_id != diffusion.mask_token_id:
        raise ValueError(
            f"load: mask_token_id must be the tokenizer's, {mask_id} ({tokenizer.mask_token!r}), "
            f"got mask_token_id={diffusion.mask_token_id} of the diffusion configuration"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = read_weights(files)
    try:
        # Given the tensors themselves, transformers looks for no file: no other index, no adapter, nothing on the Hub.
        model, report = family.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.promote_types(dtype, torch.float32) if adapter else dtype,
            attn_implementation="sdpa",  # config.json may name a kernel of the Hub, to be downloaded and run
            ignore_mismatched_sizes=True,  # reported below, by name, instead of in a table on stderr
            output_loading_info=True,
        )
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"load: {path / 'config.json'} describes no {config_type} model: {error!r}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(f"load: {path} has {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:8]}")
    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"load: {path / 'generation_config.json'} cannot be read: {error}") from error
    if adapter:
        model = merge_adapter(model, Path(adapter))
        for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
    model = model.to(device).eval()
    handle = attach(model, backend=backend, diffusion=diffusion, plain_mode=diffusion.plain_mode)
    handle.tokenizer = tokenizer
    return model
