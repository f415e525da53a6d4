"""`load`: a checkpoint becomes a model.

Only safetensors are opened and only transformers' own classes are built: what a checkpoint is called and how its
tensors are named is a row of `models.families`. No remote code runs.

Files are not trusted. A configuration is built from the fields that a family reads, so that no name of a kernel in
config.json reaches transformers, which would fetch the kernel from the Hub and run it. Files are opened as `files`
says, and the sizes in config.json are bounded before anything is built. One thing has no bound: a chat template is a
program, which jinja's sandbox keeps from everything but time and memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from .adapters import adapt, adapter_files, check_adapter, check_pattern
from .diffusion import DiffusionConfig, check_vocabulary, given_fields
from .files import (
    ADAPTER_CONFIG,
    MAX_TOKENIZER,
    CheckpointError,
    Stored,
    check_one_set,
    checkpoint_path,
    generation_values,
    is_plain,
    name_of,
    read_config,
    read_json,
    stored_tensors,
    weight_files,
)
from .limits import flag, shown
from .models.families import NATIVE, family_of
from .models.family import Family, head_dim_of
from .models.parallel import check_heads
from .models.settings import Places, Settings, settle
from .models.tensors import BUILDING, Account, Part, account_for, empty_model, slices
from .ops import Ops, check_device, check_head_dims, choose
from .patching import attach, check_limits
from .presets import resolve

# The dtypes that weights may have, by their names in safetensors.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The largest factor of the rotary base, far above those of LongLLaDA.
MAX_ROPE_SCALE = 2**16
# Names by which accelerate spreads a model.
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Methods whose code transformers may fetch from the Hub as a kernel.
_FETCHING = ("fp8", "mxfp8", "fbgemm_fp8", "nvfp4", "mxfp4", "eetq", "metal", "gguf")
# Files that transformers makes a tokenizer of, whatever its class.
_TOKENIZERS = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
# Lists of modules that a quantisation leaves as they are.
_SKIPPED = ("modules_to_not_convert", "ignore", "llm_int8_skip_modules", "modules_to_not_quantize")


def float_kinds(path: Any, dtypes: Mapping[str, str]) -> dict[str, str]:
    """The float dtypes in which weights are stored, each with the name of its first tensor.

    Raises CheckpointError if a tensor is stored in another dtype.
    """
    wrong_dtypes = [f"{name} {kind}" for name, kind in sorted(dtypes.items()) if kind not in FLOATS]
    if wrong_dtypes:
        raise CheckpointError(
            f"load: the weights of {path} must be stored as {', '.join(FLOATS)}, got {', '.join(wrong_dtypes[:4])} "
            f"({len(wrong_dtypes)} of {len(dtypes)}); a quantised checkpoint needs a quantization_config"
        )
    # Old checkpoints store the rotary frequencies, which are no weights: transformers computes them.
    return {
        kind: name for name, kind in sorted(dtypes.items(), reverse=True) if not name.endswith("rotary_emb.inv_freq")
    }


def float_dtype(path: Any, dtypes: Mapping[str, str]) -> torch.dtype:
    """The one float dtype in which weights are stored. Raises CheckpointError if there are several, or others."""
    example = float_kinds(path, dtypes)
    if len(example) > 1:
        got = ", ".join(f"{name} {kind}" for kind, name in sorted(example.items()))
        raise CheckpointError(
            f"load: the weights of {path} are stored in several dtypes ({got}); say which with dtype="
        )
    return FLOATS[next(iter(example), "F32")]


def load_tokenizer(path: str | Path, family: Family | None = None) -> Any:
    """The folder's tokenizer, or None where the folder has none. No remote code runs.

    `family` knows the class of transformers that opens the files where they name a class of remote code.
    """
    path = checkpoint_path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    _check_tokenizer(path)
    # An empty configuration keeps transformers from reading config.json, whose model_type it may not know.
    kind, arguments = AutoTokenizer, {"config": PretrainedConfig()}
    if family is not None and family.tokenizer is not None:
        kind, arguments = family.tokenizer, {}
    try:
        return kind.from_pretrained(path, trust_remote_code=False, local_files_only=True, **arguments)
    except Exception as error:
        raise CheckpointError(f"load: the tokenizer of {path} cannot be read, got {error!r}") from error


def _check_tokenizer(path: Path) -> None:
    """Raises CheckpointError for a tokenizer that is too large to be read, or whose tokenizer_config.json names files
    elsewhere, which transformers would open, or arguments that have no names."""
    for file in (path / name for name in _TOKENIZERS):
        if file.is_file() and file.stat().st_size > MAX_TOKENIZER:
            raise CheckpointError(
                f"load: {file.name} of {path} must have at most {MAX_TOKENIZER} bytes, got {file.stat().st_size}"
            )
    values = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    for name in ("gguf_file", "init_inputs"):
        if values.get(name):
            raise CheckpointError(
                f"load: {name} of tokenizer_config.json must be absent, got {name}={values[name]!r} in {path}"
            )
    # transformers puts the folder's own files in the place of every name that ends in "_file", but takes a text under
    # these names for a path.
    for name in ("vocab", "merges"):
        if isinstance(values.get(name), str):
            raise CheckpointError(
                f"load: {name} of tokenizer_config.json must stand in a file of the folder, got "
                f"{name}={shown(values[name])} in {path}"
            )
    files = values.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or not all(map(is_plain, files)):
        raise CheckpointError(
            "load: fast_tokenizer_files of tokenizer_config.json must name files of the folder, got "
            f"fast_tokenizer_files={files!r} in {path}"
        )


def _name_mask(tokenizer: Any, mask_id: int) -> None:
    """Makes the mask of a model the mask token of its tokenizer, where the tokenizer names none."""
    if tokenizer is not None and tokenizer.mask_token_id is None and mask_id < len(tokenizer):
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_id)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its files describe it, before a weight is read.

    Attributes:
        path: the folder.
        name: name of the checkpoint.
        family: its family.
        config: the native configuration.
        values: the values of config.json.
        settings: how it is decoded.
        tokenizer: the tokenizer; None = it has none.
        stored: the tensors of its files.
        unread: fields of config.json that nothing reads.
    """

    path: Path
    name: str
    family: Family
    config: Any
    values: Mapping[str, Any]
    settings: Settings
    tokenizer: Any
    stored: Mapping[str, Stored]
    unread: list[str]

    @property
    def quantised(self) -> bool:
        return self.values.get("quantization_config") is not None

    def empty(self) -> nn.Module:
        """The native model without storage."""
        try:
            return empty_model(self.family.native, self.config)
        except Exception as error:
            kind = self.config.model_type
            raise CheckpointError(
                f"load: {self.path / 'config.json'} describes no {kind} model: got {error!r}"
            ) from error

    def account(self) -> Account:
        """Where each of its tensors goes in the native model."""
        return account_for(self.family, self.config, self.empty(), self.stored)


def open_checkpoint(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    diffusion: DiffusionConfig | Mapping[str, Any] | None = None,
    rope_scale: float = 1.0,
    hints: str = "",
) -> Checkpoint:
    """Reads what the files of a checkpoint say, without its weights; the arguments are those of `load`.

    hints: the name of an adapter that will be merged, which may say how the model is decoded.
    """
    given = given_fields(diffusion)
    path = checkpoint_path(path_or_id, revision)
    name = name_of(path_or_id)
    values = read_config(path)
    family = family_of(values, told=bool(given))
    stored = stored_tensors(weight_files(path))
    check_one_set(path)
    config, unread = family.read(values)
    _stretch(config, rope_scale)
    section = values.get("quantization_config")
    if section is not None:
        config.quantization_config = _native_modules(section, family, config, stored)
    tokenizer = load_tokenizer(path, family)
    places = Places(name, config.vocab_size, values, generation_values(path), tokenizer, given, hints)
    settings = settle(family, places)
    if isinstance(diffusion, DiffusionConfig):
        settings = dataclasses.replace(settings, diffusion=diffusion)
    try:
        check_vocabulary(settings.diffusion, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"load: {error} ({settings.sources.get('eos_token_ids')})") from error
    if settings.sources.get("decoder") == "config.json, section dlm":
        _check_decoder(settings)
    _name_mask(tokenizer, settings.diffusion.mask_token_id)
    config.dlm = settings.section()
    return Checkpoint(path, name, family, config, values, settings, tokenizer, stored, unread)


def _check_decoder(settings: Settings) -> None:
    """Raises ValueError for a decoder of the section `dlm` that `generate` would refuse."""
    decoder = settings.decoder
    try:
        resolve(decoder.preset, settings.diffusion.visibility, dict(decoder.options))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"load: the decoder of config.json, section dlm, cannot be used: {error}") from error


def _stretch(config: Any, scale: float) -> None:
    """Multiplies the rotary base and the room of a configuration."""
    if scale == 1:
        return
    kind, theta = (config.rope_parameters.get(name) for name in ("rope_type", "rope_theta"))
    if not isinstance(theta, (int, float)):
        raise ValueError(
            f"load: rope_scale needs a rope_theta in config.json, got rope_parameters={config.rope_parameters!r}"
        )
    if kind != "default":
        raise ValueError(
            f"load: rope_scale goes with rotary positions of rope_type 'default', got rope_scale={scale} with "
            f"rope_type={kind!r} in config.json, which stretches them already"
        )
    config.rope_parameters["rope_theta"] *= scale
    config.max_position_embeddings = int(config.max_position_embeddings * scale)


def _native_modules(section: Any, family: Family, config: Any, stored: Mapping[str, Stored]) -> Any:
    """A quantization_config whose lists of modules have the native names.

    Raises CheckpointError for a method that transformers does not know, which it would pass over, and where no tensor
    is quantised.
    """
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if not isinstance(method, str) or not AutoHfQuantizer.supports_quant_method(dict(section)):
        raise CheckpointError(
            f"load: quantization_config must name a quant_method of transformers, got quantization_config={section!r} "
            "in config.json"
        )
    if all(tensor.dtype in FLOATS for tensor in stored.values()):
        raise CheckpointError(
            f"load: quantization_config={section!r} in config.json says that the weights are quantised, and no tensor "
            f"is: all are stored as {', '.join(sorted({tensor.dtype for tensor in stored.values()}))}"
        )
    modules = {name.rpartition(".")[0]: name for name in stored}
    mapped = dict(section)
    for key in _SKIPPED:
        if not isinstance(section.get(key), list):
            continue
        found: list[str] = []
        for entry in section[key]:
            if not isinstance(entry, str):
                raise CheckpointError(
                    f"load: quantization_config.{key} must hold names of modules, got {entry!r} in config.json"
                )
            if entry.startswith("re:"):
                check_pattern(f"quantization_config.{key} of config.json", entry.removeprefix("re:"))
            regex = entry.removeprefix("re:") if entry.startswith("re:") else rf"(^|\.){re.escape(entry)}(\.|$)"
            named = [name for module, name in modules.items() if re.search(regex, module)]
            native = [part.rpartition(".")[0] for name in named for part, _, _ in family.parts(name, config)]
            found += native or [entry]
        mapped[key] = list(dict.fromkeys(found))
    return mapped


def _check_quantised(found: Checkpoint, asked: Any) -> None:
    """Raises an error for a quantised folder whose tensors cannot all be what they say.

    Raises CheckpointError for quantised weights without their scales, and NotImplementedError for a fused one, whose
    rows cannot be cut, and for a method that fetches code from the Hub and was not asked for.
    """
    method = found.values["quantization_config"].get("quant_method")
    if method in _FETCHING and asked is None:
        raise NotImplementedError(
            f"load: quant_method {method!r} of config.json may fetch kernels, which are code, from the Hub; if they "
            "are wanted, ask for the method by name: quantization_config=..."
        )
    modules = Counter(name.rpartition(".")[0] for name in found.stored)
    for name, tensor in found.stored.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or tensor.dtype in FLOATS:
            continue
        if modules[module] == 1 and not any(other.startswith(f"{name}.") for other in found.stored):
            raise CheckpointError(
                f"load: {name} in {tensor.file} is stored as {tensor.dtype}, and no scale of it is in any file"
            )
        if len(found.family.parts(name, found.config)) > 1:
            raise NotImplementedError(
                f"load: {name} in {tensor.file} is a fused tensor of quantised numbers, which cannot be cut into those "
                f"of {found.family.native.__name__}"
            )


def load(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    diffusion: DiffusionConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    tp_plan: str | None = None,
    quantization_config: Any = None,
    backend: str | Ops = "auto",
    rope_scale: float = 1.0,
    adapter: str | Path | bool | None = None,
    merge_adapter: bool = True,
    fuse_layers: bool | None = None,
    max_positions: int | None = None,
    max_rows: int | None = None,
) -> nn.Module:
    """Opens a checkpoint as a transformers model that `generate` can decode.

    Every public family of `docs/models.md` opens by its name alone. The model is one of transformers' own classes;
    no code of the checkpoint runs. Its weights are read one by one, straight to their device.

    A plain forward of the model, `model(input_ids, attention_mask=...)`, sees as the model was trained to see
    (everything, everything with an isolated prompt, or block-causally), and never causally. `handle_of(model)` is the
    model's `PatchHandle`, which also holds the tokenizer, and `explain(model)` says where every setting comes from.

    Args:
        path_or_id: a folder with config.json, *.safetensors and tokenizer files; or an id of the Hub, such as
            "GSAI-ML/LLaDA-8B-Instruct", taken from the local cache as it lies there, and fetched if it does not lie
            there; or the name of an embedded model such as "tiny-full" (`EMBEDDED`).
        revision: branch, tag or commit of a repository of the Hub.
        diffusion: how the model was trained to be decoded: a `DiffusionConfig`, or some of its fields as a mapping.
            What is not given comes from the section `dlm` of config.json, the fields of config.json,
            generation_config.json, the tokenizer, and the family's constants, in this order. The mask id must be the
            tokenizer's, where the tokenizer has a mask.
        dtype: dtype of the weights, a float of 16, 32 or 64 bits. Default: as stored, whatever config.json says; if the
            weights are stored in several dtypes, dtype must be given.
        device: where the model goes. Default: "cuda" if there is a GPU, else "cpu".
        device_map: which modules go to which device, as in transformers, instead of `device`; needs accelerate.
        tp_plan: "auto" spreads every layer over the processes that torchrun started, by the tensor parallel plan of
            transformers: each on its GPU, or on the CPU where there is none. Every process loads and decodes, with the
            same arguments, and gets the same tokens. None = each process has the whole model.
        quantization_config: a quantisation of transformers that is applied while the weights are read.
        backend: "auto", "triton", "cpu", "reference" or an `Ops`. "auto" is Triton on a CUDA device, and the ops for a
            CPU on a CPU.
        rope_scale: factor of the base of the rotary positions, to decode longer contexts than the model was trained on.
            For LLaDA the factor is 4 at 8k tokens, 14 at 16k, 31 at 24k and 55 at 32k (LongLLaDA, arXiv:2506.14429).
            The factor also raises max_position_embeddings. Refused where config.json stretches the positions already.
        adapter: a folder or an id of the Hub with a LoRA adapter, whose tensors may have the published names of the
            family; False or None = none. An adapter that lies beside the weights in `path_or_id` is never applied
            unasked, so None is refused there.
        merge_adapter: whether the adapter is merged into the weights, in float32, or kept as layers beside them, as a
            quantised model needs.
        fuse_layers: whether the layers get forwards of few launches, as in `patch`. Default: where every module of the
            layers is known.
        max_positions: the most positions of a row, prompt and new tokens, that `generate` decodes. Default: those of
            the model.
        max_rows: the most rows that `generate` decodes together. Default: any number.
    Raises:
        ValueError: rope_scale is below 1 or would compound; an id is outside the vocabulary, or the mask is not the
            tokenizer's; two arguments contradict each other, backend "cpu" and another device among them; tp_plan is
            given outside torchrun, or the number of processes does not divide the heads.
        TypeError: an argument is of a wrong type.
        CheckpointError: there is no such folder or repository; there are no safetensors, or pickle weights only; a file
            is corrupted; tensors are missing, unexpected or of a wrong shape; config.json describes no model; nothing
            says which id the mask is, or how the model sees; an adapter was not asked for, or does not fit.
        NotImplementedError: the family is unknown, or a field of config.json asks for what the native class does not
            have; or the backend is Triton, whose kernels do not have the GPU or the head size; or fuse_layers=True, and
            a module of a layer is not known.
    """
    # 1. Check the arguments.
    if not isinstance(rope_scale, (int, float)) or isinstance(rope_scale, bool) or not 1 <= rope_scale < float("inf"):
        raise ValueError(f"load: rope_scale must be a finite number >= 1, got rope_scale={shown(rope_scale)}")
    if rope_scale > MAX_ROPE_SCALE:
        raise ValueError(f"load: rope_scale must be at most {MAX_ROPE_SCALE}, got rope_scale={shown(rope_scale)}")
    if dtype is not None and dtype not in FLOATS.values():
        raise TypeError(
            f"load: dtype must be None (as stored) or one of {', '.join(map(str, FLOATS.values()))}, got "
            f"dtype={shown(dtype)}"
        )
    check_device("load", "device", device)
    if device_map is not None and not isinstance(device_map, (str, Mapping)):
        raise TypeError(f"load: device_map must be a name, a mapping or None, got device_map={shown(device_map)}")
    if isinstance(device_map, str) and device_map not in _MAPS:
        check_device("load", "device_map", device_map)
    if isinstance(device_map, Mapping) and not device_map:
        raise ValueError(f"load: device_map must name a device for every module, got device_map={device_map!r}")
    if quantization_config is not None and not hasattr(quantization_config, "quant_method"):
        raise TypeError(
            "load: quantization_config must be one of transformers, such as BitsAndBytesConfig, got "
            f"quantization_config={shown(quantization_config)}"
        )
    if device is not None and device_map is not None:
        raise ValueError(f"load: give device or device_map, got device={device!r} and device_map={device_map!r}")
    ranks = _ranks(tp_plan, device=device, device_map=device_map, quantization_config=quantization_config)
    if adapter is not None and adapter is not False and (not isinstance(adapter, (str, Path)) or adapter == ""):
        raise TypeError(f"load: adapter must be a folder, False or None, got adapter={shown(adapter)}")

    if adapter and ranks > 1:
        raise ValueError(
            f"load: an adapter is not applied to a tensor parallel model; merge and save it by one process first, got "
            f"adapter={shown(adapter)} and tp_plan={tp_plan!r}"
        )

    flag("load", "merge_adapter", merge_adapter)
    flag("load", "fuse_layers", fuse_layers, none=True)

    # 2. Read what the files say, and find a place for every tensor.
    hints = name_of(adapter) if adapter else ""
    found = open_checkpoint(path_or_id, revision=revision, diffusion=diffusion, rope_scale=rope_scale, hints=hints)
    check_limits("load", found.config, max_positions, max_rows)
    check_heads("load", found.config, ranks)
    if found.quantised and ranks > 1:
        raise ValueError(
            f"load: the weights of a tensor parallel model must not be quantised, got tp_plan={tp_plan!r} and "
            f"quantization_config in config.json of {found.path}"
        )
    if adapter is None and (found.path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"load: {found.path} holds an adapter ({ADAPTER_CONFIG}), which is applied on request only; "
            f"say adapter={str(path_or_id)!r} to merge it, or adapter=False to open the weights alone"
        )
    native = found.empty()
    lora = None
    if adapter:
        check_adapter(adapter, found.family, found.config, native, found.stored)
        lora = adapter_files(adapter, found.family, found.config, found.stored)
    quantised = found.quantised or quantization_config is not None
    if lora is not None and merge_adapter and quantised:
        raise ValueError(
            "load: an adapter cannot be merged into quantised weights; say merge_adapter=False, got merge_adapter=True"
        )
    account = account_for(found.family, found.config, native, found.stored)
    if found.quantised:  # what a quantisation stores is known to transformers alone
        _check_quantised(found, quantization_config)
    else:
        account.check(found.path)
    dtype = _dtype(found, account, dtype)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is None or backend != "cpu":  # where a map puts the model is seen once it is there
        check_head_dims(choose(backend, torch.device(device or default)), {head_dim_of(found.config)})
    if device_map is None and ranks == 1:
        device = device or default

    # 3. Build the model from the weights.
    if found.family.unproven:
        warnings.warn(f"load: family {found.family.name} is unproven: {found.family.unproven}", stacklevel=2)
    work = torch.promote_types(dtype, torch.float32) if lora is not None and merge_adapter else dtype
    spread = DistributedConfig(tp_plan=tp_plan) if ranks > 1 else None
    model = _build(found, account, work, device, device_map, spread, quantization_config)

    # 4. Add the adapter, and patch the model.
    if lora is not None:
        model = adapt(model, lora, merge=merge_adapter)
        if merge_adapter:
            for parameter in model.parameters():  # model.to(dtype) would round the rotary frequencies too
                parameter.data = parameter.data.to(dtype)
    if device is not None and not quantised:
        model = model.to(device)
    handle = attach(
        model.eval(),
        backend=backend,
        diffusion=found.settings.diffusion,
        plain_mode=found.settings.diffusion.plain_mode,
        fuse_layers=fuse_layers,
    )
    handle.tokenizer = found.tokenizer
    handle.family = found.family.name
    handle.settings = found.settings
    handle.max_positions, handle.max_rows = max_positions, max_rows
    return model


def _ranks(tp_plan: Any, **others: Any) -> int:
    """The number of processes over which the model is spread; `others` are the arguments that place or change it
    otherwise."""
    if tp_plan is None:
        return 1
    if not isinstance(tp_plan, str) or tp_plan != "auto":
        raise ValueError(f"load: tp_plan must be 'auto' or None, got tp_plan={shown(tp_plan)}")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"load: give tp_plan or {name}, got tp_plan={tp_plan!r} and {name}={shown(value)}")
    ranks = os.environ.get("WORLD_SIZE", "")
    if not ranks.isdecimal() or not int(ranks):
        raise ValueError(
            "load: tp_plan needs processes that torchrun started (torchrun --nproc-per-node 2 ...), which say in "
            f"WORLD_SIZE how many they are, got tp_plan={tp_plan!r} and WORLD_SIZE={shown(ranks)}"
        )
    return int(ranks)


def _dtype(found: Checkpoint, account: Account, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the weights: as asked, or as stored. Tensors that keep their own dtype in the model do not count."""
    if found.quantised:
        weights = [stored for name, stored in found.stored.items() if name.endswith(".weight")]
        floats = Counter(FLOATS[stored.dtype] for stored in weights if stored.dtype in FLOATS)
        return dtype or (floats.most_common(1)[0][0] if floats else torch.bfloat16)
    parts = account.parts.items()
    dtypes = {part.name: part.stored.dtype for name, part in parts if name not in account.buffers}
    if dtype is not None:
        float_kinds(found.path, dtypes)
        return dtype
    return float_dtype(found.path, dtypes)


def _build(
    found: Checkpoint,
    account: Account,
    dtype: torch.dtype,
    device: torch.device | str | None,
    device_map: Any,
    spread: DistributedConfig | None,
    quantization_config: Any,
) -> nn.Module:
    """The native model with its weights; a rank of a model that is spread has its share of them."""
    arguments: dict[str, Any] = {"device_map": device_map}
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if spread is not None:
        arguments = {"distributed_config": spread}
    elif device_map is None and torch.device(device).type != "cpu" and has_accelerate:
        # Without accelerate, the weights are read to the CPU and moved when all of them are there.
        arguments["device_map"] = {"": torch.device(device)}
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    parts = account.parts
    if found.quantised:
        # What a quantisation adds beside a weight (scales, states) has the weight's place.
        parts = _with_quantised(found, account)
    config = found.config
    try:
        # Transformers gets the tensors themselves, and so looks for no file: no other index, no adapter and nothing on
        # the Hub. It reads each as it comes to it.
        with BUILDING:
            model, report = found.family.native.from_pretrained(
                None,
                config=config,
                state_dict=slices(parts),
                dtype=dtype,
                attn_implementation="sdpa",  # config.json may name a kernel of the Hub, which would be fetched and run
                ignore_mismatched_sizes=True,  # an error below names the tensors, in place of a table on stderr
                output_loading_info=True,
                **arguments,
            )
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        given = {"device_map": device_map, "quantization_config": quantization_config}
        given["tp_size"] = None if spread is None else spread.tp_size
        given["quantization_config of config.json"] = found.values.get("quantization_config")
        said = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise CheckpointError(
            f"load: the {config.model_type} model of {found.path} cannot be built"
            f"{f' with {said}' if said else ''}: {error!r}"
        ) from error
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    compared = config.tie_word_embeddings and not found.quantised and quantization_config is None
    if compared and head is not embedding and not torch.equal(head.to(embedding.device), embedding):
        raise CheckpointError(
            f"load: config.json of {found.path} ties the head to the embedding (tie_word_embeddings), and the stored "
            "head is another one, got two tensors"
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(
                f"load: {found.path} has {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:8]}"
            )
    if "disk" in map(str, getattr(model, "hf_device_map", {}).values()):
        raise ValueError(f"load: device_map must keep every module on a device, got 'disk' in {model.hf_device_map}")
    if found.family in NATIVE and (found.path / "generation_config.json").is_file():
        # The published ones hold settings of a decoder that transformers does not have.
        try:
            model.generation_config = GenerationConfig.from_pretrained(found.path, local_files_only=True)
        except Exception as error:
            raise CheckpointError(
                f"load: {found.path / 'generation_config.json'} cannot be read, got {error!r}"
            ) from error
    model.generation_config.eos_token_id = list(found.settings.diffusion.eos_token_ids) or None
    model.generation_config.pad_token_id = found.settings.pad_token_id
    return model


def _with_quantised(found: Checkpoint, account: Account) -> dict[str, Any]:
    """The parts of a quantised checkpoint: those of the native model, and all others under their mapped names."""
    parts = dict(account.parts)
    placed = {part.name for part in parts.values()}
    for name, stored in found.stored.items():
        if name not in placed:
            for native, start, stop in found.family.parts(name, found.config):
                parts[native] = Part(name, stored, start, stop)
    return parts
