"""LoRA adapters: their tensors get the native names, every one of them is accounted for, and they are merged or kept.

peft applies an adapter whose names do not fit as nothing, and says nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CheckpointError,
    Stored,
    check_files,
    checkpoint_path,
    is_folder,
    read_json,
    stored_tensors,
)
from .limits import shown
from .models.family import Family

_PREFIX = "base_model.model."
# Fields of adapter_config.json whose keys are names of modules.
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Its fields that name modules: a list of names or of ends of names, one pattern, or an object whose keys are patterns.
_NAMING = {
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": list,
    **dict.fromkeys(_PATTERNS, dict),
}
# The largest length of a pattern; its most repetitions, optional parts, groups and alternatives.
MAX_PATTERN, MOST_PARTS = 4096, (4, 4, 4, 64)


class Lora(NamedTuple):
    """An adapter with native names.

    Attributes:
        path: the folder it was read from.
        config: the values of adapter_config.json.
        tensors: the tensors, by the names that peft gives them.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def adapter_files(adapter: str | Path, family: Family, config: Any, base: Iterable[str]) -> Lora:
    """Reads an adapter, whose tensors have the published names of the family or the native ones.

    Args:
        adapter: its folder, or its id on the Hub.
        family: the family of the model that it is for.
        config: the native configuration of this model.
        base: names of the tensors that are stored of this model.
    Raises:
        CheckpointError: a file is missing or corrupted, two tensors go to one place, or a module that
            adapter_config.json names has no tensors.
    """
    path = adapter_folder(adapter)
    stored = stored_tensors([path / ADAPTER_WEIGHTS])
    floats = ("F64", "F32", "F16", "BF16")
    wrong = [f"{name} {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in floats]
    if wrong:
        raise CheckpointError(
            f"load: the adapter of {path} must be stored as {', '.join(floats)}, got {', '.join(wrong[:4])}"
        )
    values, tensors, targets = adapter_values(path), {}, set()
    with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file:
        for name in file.keys():
            for native, tensor in _native(name, file.get_tensor(name), family, config):
                if native in tensors:
                    raise CheckpointError(f"load: two tensors of the adapter of {path} are {native}, the second {name}")
                tensors[native] = tensor
                module = native.removeprefix(_PREFIX).partition(".lora_")
                if module[1]:
                    targets.add(module[0])
    values = {**values, "target_modules": sorted(targets), "inference_mode": True}
    modules = _modules(family, config, base)
    for key in _PATTERNS:
        if isinstance(values.get(key), dict):
            # peft takes the first key that is the end of a module's name, as a pattern.
            values[key] = {
                native: number
                for pattern, number in reversed(values[key].items())
                for native in _matching(modules, rf"(.*\.)?({pattern})")
            }
    if isinstance(values.get("modules_to_save"), list):
        named = "|".join(re.escape(name) for name in values["modules_to_save"])
        values["modules_to_save"] = _matching(modules, rf"(.*\.)?({named})")
    return Lora(path, values, tensors)


def _modules(family: Family, config: Any, base: Iterable[str]) -> dict[str, list[str]]:
    """The native modules of every published module of a model, by the names of its stored tensors."""
    modules: dict[str, list[str]] = {}
    for name in base:
        native = modules.setdefault(name.rpartition(".")[0], [])
        native += [
            module for part, _, _ in family.parts(name, config) if (module := part.rpartition(".")[0]) not in native
        ]
    return modules


def _matching(modules: Mapping[str, list[str]], pattern: str) -> list[str]:
    """The native modules whose published or native name is of a pattern."""
    return [
        native
        for published, natives in modules.items()
        for native in natives
        if re.fullmatch(pattern, published) or re.fullmatch(pattern, native)
    ]


def check_pattern(where: str, pattern: Any) -> None:
    """Raises CheckpointError unless a pattern of a file can be matched in a short time.

    Python's matcher tries every way to split a name between the parts of a pattern. So no group may be repeated, and a
    pattern has few repetitions, few optional parts, and few groups of not too many alternatives.
    """
    try:
        re.compile(pattern)
    except (TypeError, re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"load: {where} must hold names of modules or patterns of them, got {shown(pattern)[:200]}: {error}"
        ) from error
    # What is escaped or in a class repeats nothing, and a ? behind ( or behind a repetition is no option.
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern)
    plain = re.sub(r"\(\?", "(", re.sub(r"([*+}])\?", r"\1", plain))
    counts = [len(re.findall(kind, plain)) for kind in (r"[*+{]", r"\?", r"\(", r"\|")]
    if len(pattern) > MAX_PATTERN or re.search(r"\)[*+{]", plain) or any(map(int.__gt__, counts, MOST_PARTS)):
        raise CheckpointError(
            f"load: {where} must hold patterns of at most {MAX_PATTERN} characters that repeat no group, with at most "
            f"{', '.join(map(str, MOST_PARTS))} repetitions, options, groups and alternatives, got "
            f"{shown(pattern)[:200]}"
        )


def adapter_values(path: Path) -> dict[str, Any]:
    """The values of an adapter's configuration. Raises CheckpointError for names of modules that are none."""
    values = read_json(path / ADAPTER_CONFIG)
    for key, kind in _NAMING.items():
        named = values.get(key)
        try:
            if named is not None and not isinstance(named, kind):
                raise TypeError(f"it is no {kind}")
            for name in [named] if isinstance(named, str) else named or []:
                check_pattern(f"{key} of {path / ADAPTER_CONFIG}", name)
        except TypeError as error:
            raise CheckpointError(
                f"load: {key} of {path / ADAPTER_CONFIG} must hold names of modules, got {key}={shown(named)}"
            ) from error
    return values


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, which has its configuration and its weights."""
    path = Path(adapter)
    if not is_folder(path):
        try:
            path = checkpoint_path(adapter, argument="adapter")
        except CheckpointError as error:
            if "/" not in str(adapter) or path.is_absolute():
                raise _not_there(adapter, ADAPTER_CONFIG) from error
            raise
    check_files(path)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise _not_there(adapter, name)
    return path


@dataclasses.dataclass(frozen=True)
class AdapterAccount:
    """Every tensor of an adapter and its place in the native model, by the headers alone.

    Attributes:
        path: the folder it was read from.
        config: the values of adapter_config.json.
        stored: the tensors of its file.
        missing: native names of tensors that the adapter must have and has not.
        unexpected: stored tensors for which the model has no module.
        misshaped: stored tensors that do not fit their module, each with both shapes.
    """

    path: Path
    config: dict[str, Any]
    stored: Mapping[str, Stored]
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]


def account_for_adapter(
    adapter: str | Path, family: Family, config: Any, model: nn.Module, base: Iterable[str]
) -> AdapterAccount:
    """Where every tensor of an adapter goes; the arguments are those of `adapter_files`.

    model: the native model, which may be without storage.
    """
    path = adapter_folder(adapter)
    values, stored = adapter_values(path), stored_tensors([path / ADAPTER_WEIGHTS])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets: set[str] = set()
    found: set[str] = set()
    unexpected, misshaped = [], []
    for name, tensor in sorted(stored.items()):
        parts = family.parts(name.removeprefix(_PREFIX), config)
        strange = [part for part, _, _ in parts if _weight(part) not in shapes]
        if strange:
            unexpected.append(f"{name} in {tensor.file.name}")
            continue
        found |= {_PREFIX + part for part, _, _ in parts}
        targets |= {part.partition(".lora_")[0] for part, _, _ in parts if ".lora_" in part}
        expected = _shape(parts, shapes)
        if len(expected) != len(tensor.shape) or any(
            size not in (None, got) for size, got in zip(expected, tensor.shape)
        ):
            wanted = ", ".join("rank" if size is None else str(size) for size in expected)
            misshaped.append(f"{name} in {tensor.file.name} of shape {list(tensor.shape)}, expected [{wanted}]")
    missing = sorted(_expected(values, targets, family, config, base) - found)
    return AdapterAccount(path, values, stored, missing, unexpected, misshaped)


def _weight(part: str) -> str:
    """The native weight that a tensor of an adapter is for, by the tensor's native name."""
    module, factor, _ = part.partition(".lora_")
    return f"{module}.weight" if factor else part


def _shape(parts: list[tuple[str, int | None, int | None]], shapes: Mapping[str, tuple[int, ...]]) -> list[int | None]:
    """The shape of a stored tensor of an adapter that is these native parts; None stands for the adapter's rank."""
    part, rows = parts[-1][0], sum(shapes[_weight(part)][0] for part, _, _ in parts)
    if ".lora_A." in part:
        return [None, shapes[_weight(part)][1]]
    if ".lora_B." in part:
        return [rows, None]
    return [rows] if ".lora_" in part else list(shapes[part])


def _expected(
    values: Mapping[str, Any], targets: set[str], family: Family, config: Any, base: Iterable[str]
) -> set[str]:
    """The names of the tensors that an adapter must have: both factors of every module that it has a tensor of, and of
    every module that its `target_modules` names by the published name or the native one."""
    named = values.get("target_modules")
    modules = set(targets)
    if named and named != "all-linear" and not values.get("layers_to_transform") and not values.get("exclude_modules"):
        # A list holds ends of names; a string is a pattern of the whole name.
        ends = "|".join(re.escape(name) for name in named) if isinstance(named, list) else ""
        pattern = rf"(.*\.)?({ends})" if ends else str(named)
        modules |= set(_matching(_modules(family, config, base), pattern))
    return {f"{_PREFIX}{module}.lora_{factor}.weight" for module in modules for factor in "AB"}


def check_adapter(adapter: str | Path, family: Family, config: Any, model: nn.Module, base: Iterable[str]) -> None:
    """Raises CheckpointError unless every tensor of an adapter has its place; the arguments are those of
    `account_for_adapter`."""
    account = account_for_adapter(adapter, family, config, model, base)
    of_base = account.config.get("base_model_name_or_path")
    for kind, names in (
        ("missing or unknown", [*account.unexpected, *account.missing]),
        ("of another shape (size mismatch)", account.misshaped),
    ):
        if names:
            raise CheckpointError(
                f"load: the adapter of {account.path} (of base model {of_base!r}) has tensors {kind}: {names[:4]}"
            )


def _not_there(adapter: str | Path, name: str) -> CheckpointError:
    rule = f"adapter must be a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    return CheckpointError(f"load: {rule}, got {str(adapter)!r} without {name}")


def _native(name: str, tensor: Tensor, family: Family, config: Any) -> list[tuple[str, Tensor]]:
    """The tensors of an adapter that one stored tensor is: of a fused projection, one for each part."""
    prefix = _PREFIX if name.startswith(_PREFIX) else ""
    parts = family.parts(name.removeprefix(prefix), config)
    if len(parts) == 1:
        return [(prefix + parts[0][0], tensor)]
    # B has a row for every output of the projection; A is the same for all of them.
    cut = ".lora_B." in name
    return [(prefix + part, (tensor[start:stop] if cut else tensor).clone()) for part, start, stop in parts]


def _not_saved(*args: Any, **kwargs: Any) -> None:
    """Stands for `save_pretrained` of a model with an adapter beside its weights, which no checkpoint can hold."""
    raise NotImplementedError(
        "save_pretrained: the adapter of this model is kept beside its weights, and a checkpoint holds none; open it "
        "with load(..., merge_adapter=True) to save the merged weights"
    )


def adapt(model: nn.Module, lora: Lora, *, merge: bool) -> nn.Module:
    """The model with an adapter: merged into its weights, or as layers beside them. The package peft is needed."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("load: an adapter needs peft: pip install 'dlm-fast[train]'", name="peft") from error
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ends = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    shared = sorted(ends & set(lora.config["target_modules"]))
    if merge and shared:
        raise ValueError(
            f"load: an adapter of a tied weight cannot be merged, since it would change the other end too; the adapter "
            f"of {lora.path} changes {shared[0]}; say merge_adapter=False, got merge_adapter=True"
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            # peft would look for the base model, on the Hub too, and the model is here.
            config = {**lora.config, "base_model_name_or_path": None}
            (Path(folder) / ADAPTER_CONFIG).write_text(json.dumps(config))
            save_file({name: tensor.contiguous() for name, tensor in lora.tensors.items()},
                      Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})  # fmt: skip
            device = str(next(model.parameters()).device)
            adapted = peft.PeftModel.from_pretrained(model, folder, torch_device=device)
        expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if expected != lora.tensors.keys():
            raise ValueError(f"tensors missing or unknown: {sorted(expected ^ lora.tensors.keys())[:4]}")
        if merge:
            return adapted.merge_and_unload(safe_merge=True)
        for parameter in adapted.parameters():
            parameter.requires_grad_(False)
        kept = adapted.get_base_model()
        kept.save_pretrained = _not_saved
        return kept
    except Exception as error:
        raise CheckpointError(f"load: the adapter of {lora.path} cannot be merged, got {error!r}") from error
