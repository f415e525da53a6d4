"""`load`: a checkpoint folder becomes a model.

Only safetensors are opened and only transformers' own classes are built. No remote code runs, and nothing outside the
folder is read.
"""

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
from .models import MODEL_TYPES
from .ops import Ops
from .patching import attach

# The dtypes that weights may have, by their names in safetensors.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """The values of the folder's config.json."""
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
    """The folder's weight files: model.safetensors, or the shards that model.safetensors.index.json lists.

    A shard must lie in the folder itself.
    """
    single_file, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("weight_map must name files of this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"load: {index} is not a safetensors index: {error!r}") from error
        return [path / name for name in sorted(names)]
    if single_file.is_file():
        return [single_file]
    hint = ""
    other_files = sorted(p.name for p in path.glob("*.safetensors"))
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if other_files:
        hint = (
            f"; it has {', '.join(other_files)}, and weights are model.safetensors, or shards with a "
            "model.safetensors.index.json"
        )
    elif pickles:
        hint = f"; it has {', '.join(pickles)}, and pickle checkpoints are never opened: convert them to safetensors"
    raise CheckpointError(f"load: {path} has no *.safetensors weights{hint}")


def stored_dtypes(files: list[Path]) -> dict[str, str]:
    """The dtype of every tensor in safetensors files, by the name in the file's header.

    Raises CheckpointError unless all files are intact.
    """
    dtypes: dict[str, str] = {}
    for file in files:
        try:
            if not file.is_file():
                raise FileNotFoundError("no such file")
            # Opening checks the header, and checks that the file is exactly as long as the header says.
            with safe_open(file, framework="pt") as weights:
                file_dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"load: {file} is not a readable safetensors file: {error}") from error
        duplicates = sorted(file_dtypes.keys() & dtypes.keys())
        if duplicates:
            raise CheckpointError(
                f"load: {file} holds tensors that another file of {file.parent} holds too: {duplicates[:8]}"
            )
        dtypes |= file_dtypes
    return dtypes


def float_dtype(path: Path, dtypes: Mapping[str, str]) -> torch.dtype:
    """The one float dtype in which weights are stored. Raises CheckpointError if there are several, or others."""
    example = float_kinds(path, dtypes)
    if len(example) > 1:
        got = ", ".join(f"{name} {kind}" for kind, name in sorted(example.items()))
        raise CheckpointError(
            f"load: the weights of {path} are stored in several dtypes ({got}); say which with dtype="
        )
    return FLOATS[next(iter(example), "F32")]


def float_kinds(path: Path, dtypes: Mapping[str, str]) -> dict[str, str]:
    """The float dtypes in which weights are stored, each with the name of its first tensor.

    Raises CheckpointError if a tensor is stored in another dtype.
    """
    wrong_dtypes = [f"{name} {kind}" for name, kind in sorted(dtypes.items()) if kind not in FLOATS]
    if wrong_dtypes:
        raise CheckpointError(
            f"load: the weights of {path} must be stored as {', '.join(FLOATS)}, got {', '.join(wrong_dtypes[:4])} "
            f"({len(wrong_dtypes)} of {len(dtypes)}); quantised weights are not converted"
        )
    # Old checkpoints store the rotary frequencies, which are no weights: transformers computes them.
    return {
        kind: name for name, kind in sorted(dtypes.items(), reverse=True) if not name.endswith("rotary_emb.inv_freq")
    }


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor in safetensors files, by name."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}
    return tensors


def load_tokenizer(path: str | Path) -> Any:
    """The folder's tokenizer, or None where the folder has none. No remote code runs."""
    path = checkpoint_path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"load: the tokenizer of {path} cannot be read: {error}") from error


def merge_adapter(model: nn.Module, path: Path) -> nn.Module:
    """The model with a folder's LoRA adapter merged into the model's weights. The package peft is needed."""
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
    """Opens a checkpoint folder as a transformers model that `generate` can decode.

    A plain forward of the model, `model(input_ids, attention_mask=...)`, sees as the model was trained to see
    (everything, everything with an isolated prompt, or block-causally), and never causally. `handle_of(model)` is the
    model's `PatchHandle`, which also holds the tokenizer.

    Args:
        path: a folder with config.json, *.safetensors and tokenizer.json, or the name of an embedded model such as
            "tiny-full" (`EMBEDDED`).
        diffusion: how the model was trained to be decoded. Default: the `dlm` section of config.json. The mask id must
            be the tokenizer's, where the tokenizer has a mask.
        dtype: dtype of the weights, a float of 16, 32 or 64 bits. Default: as stored, whatever config.json says; if the
            weights are stored in several dtypes, dtype must be given.
        device: where the model goes. Default: "cuda" if there is a GPU, else "cpu".
        backend: "auto", "triton", "reference" or an `Ops`.
        rope_scale: factor of the base of the rotary positions, to decode longer contexts than the model was trained on.
            For LLaDA the factor is 4 at 8k tokens, 14 at 16k, 31 at 24k and 55 at 32k (LongLLaDA, arXiv:2506.14429).
            The factor also raises max_position_embeddings.
        adapter: a folder with a LoRA adapter, which peft merges into the weights in float32; False or None = none. An
            adapter that lies beside the weights in `path` is never applied unasked, so None is refused there.
    Raises:
        ValueError: rope_scale is below 1, an id is outside the vocabulary, or the mask is not the tokenizer's.
        TypeError: dtype or adapter is of a wrong type.
        CheckpointError: there is no such folder; there are no safetensors, or pickle weights only; a file is corrupted;
            weights are missing, unexpected or no floats; config.json describes no model; there is no diffusion
            configuration; an adapter was not asked for, or does not fit.
        NotImplementedError: the architecture has no model adapter here, or the checkpoint is quantised; or the backend
            is Triton, whose kernels do not have the GPU or the head size.
    """
    # 1. Check the arguments, and what config.json says of the architecture.
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
            f"in {path}; supported are float weights without one"
        )
    if adapter is None and (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"load: {path} holds an adapter ({ADAPTER_CONFIG}), which is applied on request only; "
            f"say adapter={str(path)!r} to merge it, or adapter=False to open the weights alone"
        )
    if adapter is not None and adapter is not False and (not isinstance(adapter, (str, Path)) or adapter == ""):
        raise TypeError(f"load: adapter must be a folder, False or None, got adapter={adapter!r}")

    # 2. Find the weights, and the dtype that they will have.
    files = weight_files(path)
    stored = stored_dtypes(files)
    if (path / "model.safetensors").is_file() and path / "model.safetensors" not in files:
        raise CheckpointError(
            f"load: {path} has both model.safetensors and a model.safetensors.index.json of other files; keep one of "
            "the two"
        )
    dtype = dtype if dtype is not None and set(stored.values()) <= FLOATS.keys() else float_dtype(path, stored)

    # 3. Read the configuration of the model and of its diffusion, and the tokenizer.
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

    # 4. Build the model from the weights, and refuse weights that do not fit.
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = read_weights(files)
    try:
        # Transformers gets the tensors themselves, and so looks for no file: no other index, no adapter and nothing on
        # the Hub.
        model, report = family.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.promote_types(dtype, torch.float32) if adapter else dtype,
            attn_implementation="sdpa",  # config.json may name a kernel of the Hub, which would be downloaded and run
            ignore_mismatched_sizes=True,  # an error below names the tensors, in place of a table on stderr
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

    # 5. Merge the adapter, and patch the model.
    if adapter:
        model = merge_adapter(model, Path(adapter))
        for parameter in model.parameters():  # model.to(dtype) would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
    model = model.to(device).eval()
    handle = attach(model, backend=backend, diffusion=diffusion, plain_mode=diffusion.plain_mode)
    handle.tokenizer = tokenizer
    return model
