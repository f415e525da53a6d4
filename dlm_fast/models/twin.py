"""Models that were loaded with remote code, decoded through a native twin.

The user's model (the *owner*) computes what one of transformers' own classes computes under other names
(`families.FAMILIES`). Its *twin* is an object of that class whose parameters are the owner's: the same storage, so that
the twin costs no memory and sees every update in place. The owner is read and never written: nothing is bound to the
owner, and its own forward stays what it is.

    owner                                      twin
    model.transformer.blocks.0.q_proj.weight   the same Parameter at model.layers.0.self_attn.q_proj.weight
    attention.query_key_value.weight           q_proj, k_proj and v_proj: views of its rows
    mlp.experts.N.gate_proj.weight, ...        copied into one stack per layer, since the native class holds a stack
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import DiffusionConfig, given_fields
from ..files import CheckpointError, Stored, name_of
from .changes import version_of, watch_optimizers
from .families import FAMILIES, REFUSED, family_of
from .family import Family
from .settings import Places, Settings, settle
from .tensors import Account, account_for, empty_model, pieces_of_stack

# Buffers of rotary frequencies; the rotary module of every native class has one of this name.
_FREQUENCIES = "inv_freq"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A tensor of the owner as the twin got it.

    Attributes:
        tensor: the tensor, which the mark does not keep alive.
        place: address, dtype, device and shape.
        version: how often the tensor was changed in place; None = the twin shares its storage and sees every change.
    """

    tensor: weakref.ref[Tensor]
    place: tuple[Any, ...]
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor, copied: bool) -> Mark:
        return cls(weakref.ref(tensor), place_of(tensor), version_of(tensor) if copied else None)


@dataclasses.dataclass
class Link:
    """What connects a twin with its owner.

    Attributes:
        owner: the owner, which the twin does not keep alive.
        kind: name of the owner's class.
        marks: the owner's tensors as the twin got them, by their names.
        shared_bytes: size of the parameters that are the owner's own.
        copied_bytes: size of the stacks of experts, which are copies.
    """

    owner: weakref.ref[nn.Module]
    kind: str
    marks: Mapping[str, Mark]
    shared_bytes: int
    copied_bytes: int

    def check(self, twin: nn.Module) -> None:
        """Makes the twin ready for a decode.

        Raises RuntimeError, with the name of a tensor, where the owner is not what the twin was made of.
        """
        owner = self.owner()
        if owner is None:
            return
        found = tensors_of(owner)
        for name in [*self.marks, *(found.keys() - self.marks.keys())]:
            mark, tensor = self.marks.get(name), found.get(name)
            if mark is None or tensor is None:
                self._fail(f"{name} was {'added' if mark is None else 'removed'}")
            if mark.tensor() is not tensor or mark.place != place_of(tensor):
                self._fail(f"{name} was replaced")
            if mark.version is not None and mark.version != version_of(tensor):
                self._fail(f"{name}, of which the twin has a copy, was changed in place")
        if twin.training != owner.training:
            twin.train(owner.training)

    def _fail(self, what: str) -> None:
        raise RuntimeError(
            f"dlm_fast: a {self.kind} must be as it was when it was patched, so that its native twin computes the "
            f"same, and {what}; unpatch it and patch it again"
        )

    def as_dict(self, twin: nn.Module) -> dict[str, Any]:
        """The link as plain data."""
        return {
            "class": type(twin).__name__,
            "shared_bytes": self.shared_bytes,
            "copied_bytes": self.copied_bytes,
        }


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """What changes where a tensor gets another storage: address, dtype, device and shape."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape)


def tensors_of(owner: nn.Module) -> dict[str, Tensor]:
    """The parameters and the stored buffers of a model, by the names that a checkpoint gives them."""
    found: dict[str, Tensor] = {}
    for path, module in owner.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[prefix + name] = tensor
    return found


def values_of(owner: nn.Module) -> dict[str, Any]:
    """The configuration of a model as config.json would hold it; empty where the model has none."""
    config = getattr(owner, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    values = json.loads(json.dumps(config.to_dict(), default=str))
    values["architectures"] = [*(values.get("architectures") or ()), type(owner).__name__]
    # Transformers 5 writes rope_parameters into every configuration, from what it knows by then; remote code reads the
    # field rope_theta.
    rotary, theta = values.pop("rope_parameters", None), values.get("rope_theta")
    if rotary:
        values["rope_parameters"] = rotary if theta is None else {**rotary, "rope_theta": theta}
    if not values.get("rope_scaling"):
        values.pop("rope_scaling", None)
    return values


def family_for(owner: nn.Module, values: Mapping[str, Any]) -> Family | None:
    """The published family of a model whose class is not a native one; None where there is none.

    Raises NotImplementedError for a family that is known and does not open.
    """
    if hasattr(owner, "_orig_mod") or hasattr(owner, "merge_and_unload"):
        return None  # a wrapper lends its model's configuration
    if any(values.get("model_type") in types for _, types, _ in REFUSED):
        with errors_of_patch():
            return family_of(values)
    return next((family for family in FAMILIES if family.matches(values)), None)


@contextlib.contextmanager
def errors_of_patch() -> Iterator[None]:
    """Errors of what `patch` and `load` have in common speak of `patch`."""
    try:
        yield
    except (CheckpointError, NotImplementedError, TypeError, ValueError) as error:
        message = str(error)
        if not message.startswith("load: "):
            raise
        raise type(error)("patch: " + message.removeprefix("load: ")) from error


def settings_of(
    owner: nn.Module,
    family: Family,
    values: Mapping[str, Any],
    config: Any,
    tokenizer: Any,
    diffusion: DiffusionConfig | Mapping[str, Any] | None,
) -> Settings:
    """How the owner is decoded, from the places that `load` asks too, as far as a model in memory has them."""
    name = getattr(owner, "name_or_path", None) or values.get("_name_or_path")
    generation = getattr(owner, "generation_config", None)
    places = Places(
        checkpoint=name_of(name) if name else type(owner).__name__,
        vocab_size=config.vocab_size,
        config=values,
        generation=generation.to_dict() if generation is not None else {},
        tokenizer=tokenizer,
        given=given_fields(diffusion),
    )
    settings = settle(family, places)
    return dataclasses.replace(settings, diffusion=diffusion) if isinstance(diffusion, DiffusionConfig) else settings


def build(owner: nn.Module, family: Family, config: Any) -> tuple[nn.Module, Link]:
    """The native twin of a model, and what connects the two.

    Args:
        owner: the model, which stays as it is.
        family: its family.
        config: its native configuration.
    Raises:
        NotImplementedError: the owner is quantised, lies on several devices, or has a replaced forward, so that no
            native class computes the same from its tensors.
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    # 1. Check that the owner's tensors say all.
    tensors = tensors_of(owner)
    kind = type(owner).__name__
    _check_forwards(owner, kind)
    _check_tensors(owner, kind, tensors)

    # 2. Find a place for every tensor.
    twin = empty_model(family.native, config)
    stored = {name: Stored(Path(kind), str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    account = account_for(family, config, twin, stored)
    account.check(f"the {kind}")

    # 3. Put the tensors there, and compute what no checkpoint holds.
    copied = _stacks(twin, account)
    _check_versions(kind, [account.parts[name].name for names in copied.values() for name in names], tensors)
    if copied:
        watch_optimizers()
    copied_bytes = sum(size_of(tensors[account.parts[name].name]) for names in copied.values() for name in names)
    if copied_bytes:
        warnings.warn(
            f"patch: {family.native.__name__} holds the experts of a layer as one stack, so that the native twin of "
            f"this {kind} copies them: {copied_bytes:,} bytes ({copied_bytes / 2**30:.2f} GiB) beside the model's own; "
            "dlm_fast.load opens the checkpoint without a copy",
            stacklevel=4,
        )
    _share(twin, account, tensors)
    for name in copied:
        _set(twin, name, _stacked(twin.get_parameter(name), name, account, tensors))
    _tie(twin, account, tensors)
    _compute_buffers(twin, config, next(iter(tensors.values())).device)

    # 4. Note what was shared, and say where the owner itself computes something else.
    _check_frequencies(owner, kind, twin)
    of_stacks = {account.parts[name].name for names in copied.values() for name in names}
    marks = {name: Mark.of(tensor, name in of_stacks) for name, tensor in tensors.items()}
    distinct = {id(tensor): size_of(tensor) for name, tensor in tensors.items() if name not in of_stacks}
    link = Link(weakref.ref(owner), kind, marks, sum(distinct.values()), copied_bytes)
    return twin.train(owner.training), link


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def _check_forwards(owner: nn.Module, kind: str) -> None:
    """Raises NotImplementedError for a module whose forward is not its class's, and warns of hooks."""
    hooked = []
    for name, module in owner.named_modules():
        where = f"module {name!r} of this {kind}" if name else f"this {kind}"
        if "_hf_hook" in module.__dict__:
            raise NotImplementedError(
                f"patch: {where} has a hook of accelerate (device_map over several devices, or offload), which moves "
                "its tensors; put the model on one device, or open it with dlm_fast.load(..., device_map=...)"
            )
        if "forward" in module.__dict__:
            raise NotImplementedError(
                f"patch: {where} has a replaced forward, which its native twin would not run; undo that first"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            hooked.append(where)
    if hooked:
        more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
        warnings.warn(
            f"patch: the forward hooks of {hooked[0]}{more} do not run in a decode, which runs the native twin",
            stacklevel=5,
        )


def _check_tensors(owner: nn.Module, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises NotImplementedError for tensors that are no plain floats on one device."""
    quantised = getattr(getattr(owner, "config", None), "quantization_config", None) is not None
    for name, tensor in tensors.items():
        plain = type(tensor) in (nn.Parameter, Tensor) and type(tensor.data) is Tensor
        if quantised or not plain or not tensor.is_floating_point():
            got = "a quantization_config" if quantised else f"{name} as {type(tensor.data).__name__} of {tensor.dtype}"
            raise NotImplementedError(
                f"patch: the tensors of a {kind} must be plain floats, got {got}; open a quantised checkpoint with "
                "dlm_fast.load"
            )
        first = next(iter(tensors.values()))
        if tensor.is_meta or tensor.device != first.device:
            raise NotImplementedError(
                f"patch: the tensors of a {kind} must lie on one device, got {name} on {tensor.device} and others on "
                f"{first.device}; open the checkpoint with dlm_fast.load(..., device_map=...)"
            )


def _stacks(twin: nn.Module, account: Account) -> dict[str, list[str]]:
    """The stacks that the owner holds as single experts: native name -> the names of the experts' weights."""
    pieces = {name: pieces_of_stack(name, tuple(tensor.shape)) for name, tensor in twin.named_parameters()}
    return {
        name: [piece.name for piece in parts] for name, parts in pieces.items() if parts and name not in account.parts
    }


def _check_versions(kind: str, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises NotImplementedError for tensors that would be copied and do not count their changes."""
    uncounted = [name for name in names if tensors[name].is_inference()]
    if uncounted:
        raise NotImplementedError(
            f"patch: the experts of a {kind} must count their changes, since its native twin copies them, got the "
            f"inference tensor {uncounted[0]}; create the model outside torch.inference_mode()"
        )


def _share(twin: nn.Module, account: Account, tensors: Mapping[str, Tensor]) -> None:
    """Gives the twin the owner's own tensors, or views of their rows."""
    places = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    for name, part in account.parts.items():
        if name not in places:
            continue  # a single expert
        tensor = tensors[part.name]
        is_parameter = isinstance(places[name], nn.Parameter)
        if part.start is not None:
            tensor = tensor.detach()[part.start : part.stop]
        elif isinstance(tensor, nn.Parameter) and not is_parameter:
            tensor = tensor.detach()
        if is_parameter and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        _set(twin, name, tensor)


def _set(twin: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(twin.get_submodule(path), leaf, tensor)


def _stacked(empty: Tensor, name: str, account: Account, tensors: Mapping[str, Tensor]) -> nn.Parameter:
    """A stack of the owner's experts."""
    pieces = pieces_of_stack(name, tuple(empty.shape))
    first = tensors[account.parts[pieces[0].name].name]
    stack = torch.empty(empty.shape, dtype=first.dtype, device=first.device)
    for piece in pieces:
        stack[piece.expert, piece.start : piece.stop] = tensors[account.parts[piece.name].name].detach()
    return nn.Parameter(stack, requires_grad=False)


def _tie(twin: nn.Module, account: Account, tensors: Mapping[str, Tensor]) -> None:
    """Gives a tied tensor that the owner does not have its source's.

    Raises CheckpointError where the owner has both, and they are two.
    """
    for name, source in (getattr(twin, "all_tied_weights_keys", None) or {}).items():
        part, original = account.parts.get(name), account.parts[source]
        if part is None:
            _set(twin, name, twin.get_parameter(source))
        elif tensors[part.name].data_ptr() != tensors[original.name].data_ptr():
            raise CheckpointError(
                f"patch: the configuration ties {part.name} to {original.name}, and they are two tensors in the model; "
                "call model.tie_weights(), or set tie_word_embeddings to False in its configuration"
            )


def _compute_buffers(twin: nn.Module, config: Any, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds, which are the rotary frequencies."""
    for module in twin.modules():
        if any(module._buffers[name] is not None for name in module._non_persistent_buffers_set):
            with torch.device(device):
                module._buffers.update(type(module)(config)._buffers)
    empty = [name for name, tensor in (*twin.named_parameters(), *twin.named_buffers()) if tensor.is_meta]
    assert not empty, empty


def _check_frequencies(owner: nn.Module, kind: str, twin: nn.Module) -> None:
    """Warns of rotary frequencies of the owner that are not those of its configuration."""
    expected = next(buffer for name, buffer in twin.named_buffers() if _is_frequencies(name))
    wrong = []
    for name, buffer in owner.named_buffers():
        if not _is_frequencies(name):
            continue
        # A model that was cast to bfloat16 has rounded frequencies.
        tolerance = 8 * torch.finfo(buffer.dtype).eps
        if buffer.shape != expected.shape or not torch.allclose(buffer.float(), expected, rtol=tolerance, atol=0):
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        warnings.warn(
            f"patch: the buffer {wrong[0]}{more} of this {kind} does not hold the rotary frequencies of its "
            "configuration (from_pretrained of transformers 5 leaves such buffers of remote code uninitialised), so "
            "that the model's own forward is wrong; its native twin computes them and is right. To repair the model: "
            f"for name, buffer in model.named_buffers(): name.endswith({_FREQUENCIES!r}) and "
            f"buffer.copy_(dlm_fast.handle_of(model).model.model.rotary_emb.{_FREQUENCIES})",
            stacklevel=5,
        )


def _is_frequencies(name: str) -> bool:
    return name.rpartition(".")[2] == _FREQUENCIES
