"""`patch` and `unpatch`: verify a model, bind our attention to it, and restore it.

A patch changes instances only, never a class and never a global of a module. A model that was loaded with remote code
is not changed at all: its native twin is patched (`models.twin`).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dlm_kernels import Window

from .diffusion import DiffusionConfig, check_vocabulary
from .limits import MAX_WHOLE, flag, shown, whole
from .models import ADAPTERS, Adapter, adapter_for, twin
from .models.family import Family
from .models.native import ATTENTION_NAME, AttentionCall
from .models.parallel import ranks_of
from .models.settings import Settings, section_settings
from .models.tensors import BUILDING
from .ops import OP_NAMES, Ops, check_head_dims, choose

_ATTRIBUTE = "_dlm_fast_patch"
# The handles of models that are decoded through a native twin. Nothing is written into such a model, not even a handle.
_HANDLES_OF_OWNERS: weakref.WeakKeyDictionary[nn.Module, PatchHandle] = weakref.WeakKeyDictionary()


class PatchHandle:
    """A patched model: what the decode loop needs to know about the model, and the way back.

    A handle is also a context manager: leaving the block restores the model, whatever happened inside. A deep copy or a
    pickle of the patched instance is patched too, and has a handle of its own (`handle_of`).

    Attributes:
        model: the patched instance. For a model that was loaded with remote code it is the model's native twin, until
            the patch is taken back.
        adapter: the adapter of the model's family.
        ops: the backend in use.
        diffusion: the model's diffusion configuration; None = none, so that only plain forwards run.
        tokenizer: the tokenizer that `load` found or `patch` was given; None = there is none.
        family: name of the checkpoint's family; None where nobody knows.
        settings: how the checkpoint is decoded, and where that is said; None after a `patch` of a native model with
            `diffusion`.
        link: what connects the native twin with the model that it decodes; None = the model is patched itself.
        plain_mode: how a plain forward (`model(input_ids)`) sees: "full", "block", "isolated" or "causal".
        max_positions: the most positions of a row that `generate` decodes; None = those of the model.
        max_rows: the most rows that `generate` decodes together; None = any number.
        unfused: why the layers run as transformers has them; None = they are fused.
        attention_calls: number of attention calls through our op since the model was patched, one per layer and
            forward. Only eager forwards count, since a counter in a compiled graph would compile the graph again at
            every call.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        ops: Ops,
        diffusion: DiffusionConfig | None,
        plain_mode: str,
        unfused: str | None,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.ops = ops
        self.diffusion = diffusion
        self.tokenizer: Any = None
        self.family: str | None = None
        self.settings: Settings | None = None
        self.link: twin.Link | None = None
        self.plain_mode = plain_mode
        self.unfused = unfused
        self.max_positions: int | None = None
        self.max_rows: int | None = None
        self.attention_calls = 0
        self._old_config: Any = None
        self._configured: list[nn.Module] = []
        self._forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        self._hooks: list[Any] = []
        self._running = 0  # plain forwards that have begun and not ended
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: the adapter by its name, and no count of forwards. A copy of a twin has
        parameters of its own, and so no link."""
        initial = {"adapter": self.adapter.__name__, "attention_calls": 0, "_running": 0, "_lock": None, "link": None}
        return {**self.__dict__, **initial}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, adapter=importlib.import_module(state["adapter"]), _lock=threading.Lock())

    def checked_model(self) -> nn.Module:
        """The model that decodes, before a decode.

        Raises RuntimeError where a twin would not compute what the model that it decodes now computes, and ValueError
        for a model without numbers to compute with.
        """
        check_placed("generate", self.model)
        if self.link is not None:
            self.link.check(self.model)
        return self.model

    def window_hidden(self, input_ids: Tensor, window: Window, cache: Any) -> Tensor:
        """Last hidden states [B, W, d] of a window of tokens [B, W].

        Raises RuntimeError where the patch is not in place any more.
        """
        if type(self.model) not in self.adapter.CLASSES:
            raise RuntimeError(f"dlm_fast: this {type(self.model).__name__} was unpatched, which freed its native twin")
        if cache is not None and cache.page_table is not None:
            window = dataclasses.replace(window, page_table=cache.page_table)
        call = AttentionCall(window, cache, self.ops)
        hidden = self.adapter.window_hidden(self.model, input_ids, call)
        self._finish(call)
        return hidden

    def _finish(self, call: AttentionCall) -> None:
        """Raises RuntimeError unless every layer attended through `call`.

        A layer that attended through transformers' own attention saw causally.
        """
        altered = self.adapter.altered(self.model, call)
        if altered is not None:
            raise RuntimeError(
                f"dlm_fast: every layer of a patched {type(self.model).__name__} must attend through dlm_fast, and was "
                f"passed by in {altered}; undo that, or unpatch the model and patch it again"
            )
        if not torch.compiler.is_compiling():
            with self._lock:
                self.attention_calls += len(call.served)

    def unpatch(self) -> None:
        """Restores the model. A second call raises RuntimeError."""
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            raise RuntimeError("unpatch: this model is not patched by this handle (was it unpatched before?)")
        self._restore()

    def _bind(self) -> None:
        """Puts the patch in place, or leaves the model as it was if that fails."""
        base = self.adapter.base_model(self.model)
        self._old_config = self.model.config
        # The config object chooses the attention, and two models may share one, so this instance gets a copy.
        config = copy.copy(self._old_config)
        config._attn_implementation = ATTENTION_NAME
        try:
            for module in self.model.modules():
                if getattr(module, "config", None) is self._old_config:
                    module.config = config
                    self._configured.append(module)
            if self.unfused is None:
                self._forwards = self.adapter.fused_forwards(self.model, self.ops)
                for module, forward in self._forwards.items():
                    module.__dict__["forward"] = forward
            self._hooks = [
                base.register_forward_pre_hook(self._begin_plain, with_kwargs=True),
                base.register_forward_hook(self._end_plain, with_kwargs=True, always_call=True),
            ]
            self.model.__dict__[_ATTRIBUTE] = self
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        """Takes the patch back; a plain forward that is still running keeps the hook that checks its end."""
        for module in self._configured:
            module.config = self._old_config
        self._configured = []
        for module, forward in self._forwards.items():
            # What was bound since stays, and runs the class's forward through ours.
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]
        self._forwards = {}
        self.model.__dict__.pop(_ATTRIBUTE, None)
        with self._lock:
            # A forward that runs in another thread must still find, at its end, that its layers were changed meanwhile.
            remaining = self._hooks[1:] if self._running else []
            for hook in self._hooks[: len(self._hooks) - len(remaining)]:
                hook.remove()
            self._hooks = remaining
        if self.link is not None:
            owner, self.link = self.link.owner(), None
            if owner is not None:
                _HANDLES_OF_OWNERS.pop(owner, None)
                self.model = owner  # the handle keeps no twin alive

    def _begin_plain(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Gives a plain forward (`model(input_ids, attention_mask=...)`) the window of the model's visibility."""
        if kwargs.get("dlm_call") is not None:
            return args, kwargs
        kwargs = dict(kwargs)
        prompt_lengths = kwargs.pop("prompt_lengths", None)
        input_ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        source = input_ids if input_ids is not None else embeds
        if source is None:
            raise ValueError("forward: one of input_ids and inputs_embeds must be given")
        # transformers 5.24 calls it `cache`, and 5.23 `past_key_values`.
        past = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
        if past is not None and past.get_seq_length():
            raise NotImplementedError(
                f"forward: a plain forward takes no earlier keys, got {past.get_seq_length()} in past_key_values; use "
                "use_cache=False"
            )
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        window = plain_window(
            self.plain_mode,
            source.shape[:2],
            source.device,
            diffusion=self.diffusion,
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=kwargs.get("position_ids"),
            prompt_lengths=prompt_lengths,
        )
        kwargs["dlm_call"] = AttentionCall(window, None, self.ops, plain=True)
        if not torch.compiler.is_compiling():
            with self._lock:
                self._running += 1
        return args, kwargs

    def _end_plain(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Checks a plain forward at its end; `output` is None if the forward failed."""
        call = kwargs.get("dlm_call")
        if call is None or not call.plain:
            return
        if not torch.compiler.is_compiling():
            with self._lock:
                self._running -= 1
                if not self._running and self.model.__dict__.get(_ATTRIBUTE) is not self:
                    for hook in self._hooks:
                        hook.remove()
                    self._hooks = []
        if output is not None:
            self._finish(call)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            self._restore()


def plain_window(
    mode: str,
    shape: tuple[int, int],
    device: torch.device,
    *,
    diffusion: DiffusionConfig | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    prompt_lengths: Tensor | None,
) -> Window:
    """The window of a forward over whole sequences [B, L] without a cache.

    Padding may stand anywhere in a row. Blocks count over the real tokens of a row: from the first one ("abs"), or from
    the end of the prompt ("rel"). A model with a causal prefix sees causally up to the block that holds the row's first
    mask, and in blocks from there on.

    Args:
        mode: how the forward sees: "full", "block", "causal", or "isolated" (the prompt sees itself, and everything
            after the prompt sees everything).
        shape: B and L.
        device: device of the window's tensors.
        diffusion: the model's diffusion configuration, which modes "block" and "isolated" need.
        input_ids: [B, L] token ids; None where the forward has embeddings instead.
        attention_mask: [B, L], 0 = padding; None = no padding.
        position_ids: [B, L] as the caller gave them, to refuse packed sequences.
        prompt_lengths: [B] real tokens of each prompt; None = the prompt is what stands before the first mask, as in
            the canvas of every decoder.
    """
    # 1. Refuse what a plain forward cannot do.
    B, L = shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(f"forward: attention_mask must be [B, L], got shape {tuple(attention_mask.shape)}")
    if attention_mask is not None and tuple(attention_mask.shape) != (B, L):
        raise ValueError(f"forward: attention_mask must have shape {(B, L)}, got {tuple(attention_mask.shape)}")
    if position_ids is not None and attention_mask is None and bool((position_ids.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "forward: packed sequences (position_ids that jump, no attention_mask) are not supported"
        )
    if prompt_lengths is not None and mode not in ("block", "isolated"):
        raise ValueError(
            "forward: prompt_lengths has a meaning for block-causal models and those of an isolated prompt only, "
            f"this one is {mode!r}"
        )

    # 2. Real tokens, and each one's index among the real tokens of its row.
    int32 = {"dtype": torch.int32, "device": device}
    is_real = (
        torch.ones(B, L, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.to(device) != 0
    )
    index = torch.arange(L, **int32).expand(B, L)
    place = is_real.int().cumsum(-1, dtype=torch.int32) - 1

    # 3. Block ids: 0 for the prompt, then 1, 2, ... for the blocks of the response.
    block = torch.zeros(B, L, **int32)
    if mode in ("block", "isolated"):
        assert diffusion is not None and (mode == "isolated" or diffusion.block_length is not None)
        start = torch.zeros(B, 1, **int32)
        if diffusion.block_alignment != "abs":
            if prompt_lengths is None:
                if input_ids is None:
                    raise ValueError(
                        "forward: a model that treats the prompt differently needs prompt_lengths with inputs_embeds"
                    )
                is_given = is_real & (input_ids != diffusion.mask_token_id)
                # A real token stands before the first mask if the running count of masks is still zero there.
                prompt_lengths = (is_given & ((is_real & ~is_given).cumsum(-1) == 0)).sum(-1)
            start = prompt_lengths.to(**int32).view(B, 1)
        length = (
            L if mode == "isolated" else diffusion.block_length
        )  # with an isolated prompt the response is one block
        block = torch.where(place < start, 0, 1 + torch.div(place - start, length, rounding_mode="floor"))
        if diffusion.block_alignment == "both":
            block = torch.div(place + (-start) % length, length, rounding_mode="floor")
        if diffusion.causal_prefix:
            if input_ids is None:
                raise ValueError("forward: a model with a causal prefix needs input_ids, which hold its first mask")
            is_open = is_real & (input_ids == diffusion.mask_token_id)
            first_open = torch.where(is_open, block, L + 1).amin(-1, keepdim=True)
            # Blocks of one position see causally; the ids of those from the first mask on are larger.
            block = torch.where(block < first_open, place, L + block)
    return Window(
        q_pos=index.contiguous(),
        q_block=torch.where(is_real, block, -1).int(),
        q_len=torch.full((B,), L, **int32),
        kv_slot=torch.full((B, L), -1, **int32),
        kv_len=torch.zeros(B, **int32),
        replaced=torch.zeros(B, 2, **int32),
        cache_row=torch.arange(B, **int32),
        mode="block" if mode == "isolated" else mode,
    )


def check_placed(owner: str, model: nn.Module) -> None:
    """Raises ValueError unless the parameters of a model lie on one device, or where accelerate spread them."""
    devices = {str(parameter.device): name for name, parameter in model.named_parameters()}
    spread = hasattr(model, "hf_device_map")
    if not devices:
        raise ValueError(f"{owner}: model must have parameters, got a {type(model).__name__} without any")
    if "meta" in devices and not spread:
        raise ValueError(
            f"{owner}: model must have its numbers, got {devices['meta']} on device 'meta', which has none"
        )
    if len(devices) > 1 and not spread:
        got = ", ".join(f"{name} on {device}" for device, name in sorted(devices.items()))
        raise ValueError(f"{owner}: model must be on one device, or spread by load(device_map=...), got {got}")


def attach(
    model: nn.Module,
    *,
    backend: str | Ops,
    diffusion: DiffusionConfig | None,
    plain_mode: str,
    fuse_layers: bool | None = None,
) -> PatchHandle:
    """Patches `model`. `patch` and `load` differ only in `plain_mode`, by which plain forwards see."""
    adapter = adapter_for(model)
    if _ATTRIBUTE in model.__dict__:
        raise RuntimeError("patch: this model is already patched; unpatch it first")
    adapter.probe(type(model))
    adapter.verify(model)
    check_placed("patch", model)
    if diffusion is not None:
        check_vocabulary(diffusion, model.config.vocab_size)
    ops = choose(backend, next(model.parameters()).device)
    check_head_dims(ops, adapter.head_dims(model))
    unfused = "asked for" if fuse_layers is False else adapter.unfusable(model)
    if fuse_layers and unfused is not None:
        raise NotImplementedError(
            f"dlm_fast: the layers of this {type(model).__name__} cannot be fused: {unfused}; got fuse_layers=True"
        )
    handle = PatchHandle(model, adapter, ops, diffusion, plain_mode, unfused)
    handle._bind()
    return handle


def check_limits(owner: str, config: Any, max_positions: Any, max_rows: Any) -> None:
    """Raises ValueError for limits of a service that a model of this configuration cannot have."""
    whole(owner, "max_positions", max_positions, 1, getattr(config, "max_position_embeddings", MAX_WHOLE), none=True)
    whole(owner, "max_rows", max_rows, 1, none=True)


def patch(
    model: nn.Module,
    *,
    diffusion: DiffusionConfig | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    backend: str | Ops = "auto",
    fuse_layers: bool | None = None,
    max_positions: int | None = None,
    max_rows: int | None = None,
) -> PatchHandle:
    """Makes a model ready for `generate`. Returns the patch's handle.

    A native model runs its attention through our op. A plain forward of the patched model keeps the visibility that the
    class has in transformers (causal), and its logits equal those of the original model within rounding, under autocast
    too. Only this instance changes; other models stay as they are, even models that share its config. A forward in
    which a layer did not attend through our op raises RuntimeError. To compile the model, patch it first.

    A model of a published family that was loaded with remote code is not touched at all. `generate(model)` decodes it
    through a native twin (`handle.model`) that shares its parameters: the twin sees updates in place, and costs memory
    for stacks of experts only, which a warning states before they are made. A parameter that was replaced since the
    patch, or an expert that was changed, is an error of the next decode. A change through `.data` is not counted, so
    after such a change of an expert patch the model again. The model's own forward stays its own.

    Args:
        model: a model of a class that `load` builds, with full attention in every layer, which transformers may have
            spread over ranks by its tensor parallel plan: then every rank patches and decodes; or a model of a
            published family (docs/models.md) as its remote code builds it, on one device and not quantised.
        diffusion: how the model was trained to be decoded. Default: the `dlm` section of the model's config, if the
            config has one; for a published family what its configuration, generation config, tokenizer and row in the
            table of families say, as in `load`, which also takes some fields as a mapping.
        tokenizer: the model's tokenizer, for prompts that are texts; for a published family also a place where
            settings are looked for.
        backend: "auto", "triton", "cpu", "reference" or an `Ops`. "auto" is Triton on a CUDA device, and the ops for a
            CPU on a CPU.
        fuse_layers: whether the layers of the instance get forwards of ours, which need 5 launches beside the products
            and the attention instead of 30 to 48. They round where transformers' own do: on a CPU the bits are the
            same, in Triton within one rounding of each op. Default: where every module of the layers is known;
            `explain` says why not. A layer runs as transformers has it where it is asked for what they do not do: under
            autocast, with a cache of transformers, with gradients in Triton, with checkpointed activations, or where
            one of its norms, its attention or its MLP has hooks.
        max_positions: the most positions of a row, prompt and new tokens, that `generate` decodes. Default: those of
            the model.
        max_rows: the most rows that `generate` decodes together. Default: any number.
    Raises:
        NotImplementedError: the model is of another class, or has a modified attention module, a replaced forward or a
            sliding window; or is tensor parallel by a plan that is not understood; or the backend is Triton, whose
            kernels do not have the GPU or the head size; or fuse_layers=True, and a module of a layer is not known.
        RuntimeError: the model is patched already.
        TypeError: an argument is of a wrong type.
        ValueError: the model's parameters are on several devices or on "meta"; the vocabulary does not hold an id of
            the diffusion configuration; or nothing says which id the mask is, or how the model sees; or the model's
            tensors are not those of its family; or the backend is "cpu" and the model is not on a CPU; or the ranks of
            a tensor parallel model do not divide its heads.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a model of transformers, got model={shown(model)}")
    if tokenizer is not None and not (callable(tokenizer) and callable(getattr(tokenizer, "decode", None))):
        raise TypeError(f"patch: tokenizer must be a transformers tokenizer or None, got tokenizer={shown(tokenizer)}")
    flag("patch", "fuse_layers", fuse_layers, none=True)
    if not any(type(model) in adapter.CLASSES for adapter in ADAPTERS):
        values = twin.values_of(model)
        family = twin.family_for(model, values)
        if family is not None:
            limits = {"max_positions": max_positions, "max_rows": max_rows}
            return _patch_owner(model, family, values, diffusion, tokenizer, backend, fuse_layers, **limits)
    settings = None
    if diffusion is None and getattr(getattr(model, "config", None), "dlm", None) is not None:
        settings = section_settings(model.config.dlm)
        diffusion = settings.diffusion
    check_limits("patch", getattr(model, "config", None), max_positions, max_rows)
    causal = getattr(getattr(model, "config", None), "is_causal", True)
    plain_mode = "causal" if causal else "full"
    handle = attach(model, backend=backend, diffusion=diffusion, plain_mode=plain_mode, fuse_layers=fuse_layers)
    handle.settings = settings
    handle.tokenizer = tokenizer
    handle.max_positions, handle.max_rows = max_positions, max_rows
    return handle


def _patch_owner(
    model: nn.Module,
    family: Family,
    values: Mapping[str, Any],
    diffusion: DiffusionConfig | Mapping[str, Any] | None,
    tokenizer: Any,
    backend: str | Ops,
    fuse_layers: bool | None,
    *,
    max_positions: int | None,
    max_rows: int | None,
) -> PatchHandle:
    """Patches the native twin of a model of a published family."""
    with BUILDING:  # of several threads one patches the model, and the others are told
        if model in _HANDLES_OF_OWNERS:
            raise RuntimeError("patch: this model is already patched; unpatch it first")
        with twin.errors_of_patch():
            config, _ = family.read(values)
            check_limits("patch", config, max_positions, max_rows)
            settings = twin.settings_of(model, family, values, config, tokenizer, diffusion)
            check_vocabulary(settings.diffusion, config.vocab_size)
            config.dlm = settings.section()  # for `save_pretrained` of the twin
            built, link = twin.build(model, family, config)
        if family.unproven:
            warnings.warn(f"patch: family {family.name} is unproven: {family.unproven}", stacklevel=3)
        handle = attach(
            built,
            backend=backend,
            diffusion=settings.diffusion,
            plain_mode=settings.diffusion.plain_mode,
            fuse_layers=fuse_layers,
        )
        handle.tokenizer, handle.family, handle.settings, handle.link = tokenizer, family.name, settings, link
        handle.max_positions, handle.max_rows = max_positions, max_rows
        _HANDLES_OF_OWNERS[model] = handle
        return handle


def handle_of(model: nn.Module) -> PatchHandle:
    """The handle of a patched or loaded model.

    Raises ValueError if the model is neither patched nor loaded, and TypeError if `model` is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "dlm_fast: model must be a model from dlm_fast.load, or patched by dlm_fast.patch, got "
            f"model={shown(model)}"
        )
    handle = model.__dict__.get(_ATTRIBUTE) or _HANDLES_OF_OWNERS.get(model)
    if handle is None:
        advice = "use dlm_fast.load(path) or dlm_fast.patch(model)"
        if hasattr(model, "_orig_mod"):
            advice = "give the model that was compiled (model._orig_mod), patched or loaded"
        raise ValueError(f"dlm_fast: {type(model).__name__} is not patched; {advice}")
    return handle


def explain(model: nn.Module) -> dict[str, Any]:
    """Which ops a patched model runs, on which device and why, and where its settings come from, as plain data."""
    handle = handle_of(model)
    settings = handle.settings
    device = next(model.parameters()).device
    return {
        "model": type(model).__name__,
        "device": str(device),
        "ranks": ranks_of(handle.model),
        "backend": handle.ops.name,
        "reason": handle.ops.reason,
        "ops": {name: f"{getattr(handle.ops, name).__module__}.{name}" for name in OP_NAMES},
        "layers": "fused" if handle.unfused is None else f"of transformers: {handle.unfused}",
        "plain_forward": handle.plain_mode,
        "visibility": handle.diffusion.visibility if handle.diffusion else None,
        "prompt_isolated": handle.diffusion.prompt_isolated if handle.diffusion else None,
        "causal_prefix": handle.diffusion.causal_prefix if handle.diffusion else None,
        "max_positions": handle.max_positions,
        "max_rows": handle.max_rows,
        "attention_calls": handle.attention_calls,
        "family": handle.family,
        "settings": {} if settings is None else settings.as_dict(),
        "twin": None if handle.link is None else handle.link.as_dict(handle.model),
    }
