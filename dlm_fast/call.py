"""A call of `generate` or of a session, before anything is decoded: the decoder that it names, and its rows."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import requests
from .limits import shown
from .patching import PatchHandle, handle_of
from .policies import Function
from .presets import Preset, resolve
from .requests import Requests


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model that is ready to decode by a preset.

    Attributes:
        handle: the model's handle.
        preset: the preset, with every option that the call replaced.
        tokenizer: what encodes prompts and decodes responses; None = nothing does.
        device: where the model is.
        temperature: temperature of the draws, where a row has none of its own.
        top_p: filter of the draws.
        last_block: what the call says of a last block; None = nothing.
    """

    handle: PatchHandle
    preset: Preset
    tokenizer: Any
    device: torch.device
    temperature: Any
    top_p: float
    last_block: str | None

    @property
    def room(self) -> requests.Room:
        """How long a row may be."""
        return requests.Room.of(self.handle.model.config.max_position_embeddings, self.handle.max_positions)


def read_decoder(
    model: nn.Module,
    *,
    preset: str | Preset | None,
    policy: Any,
    temperature: Any,
    top_p: Any,
    tokenizer: Any,
    options: Mapping[str, Any],
) -> Decoder:
    """Checks the model, resolves the decoder, and checks that it fits the model; the arguments are those of
    `generate`."""
    # 1. Check that the model is ready to decode.
    if preset is not None and not isinstance(preset, (str, Preset)):
        raise TypeError(f"generate: preset must be a name of dlm_fast.PRESETS or a Preset, got preset={shown(preset)}")
    handle = handle_of(model)
    if handle.diffusion is None:
        raise ValueError(
            "generate: the model has no diffusion configuration; pass diffusion= to dlm_fast.patch or load"
        )
    check_mode(model)
    model = handle.checked_model()

    # 2. Resolve the decoder, and check that it fits the model.
    named = preset is not None or handle.settings is None or handle.settings.decoder is None
    options = settled(handle, {**options, "preset": preset, "temperature": temperature, "top_p": top_p})
    preset, temperature, top_p = (options.pop(name) for name in ("preset", "temperature", "top_p"))
    with _unnamed_decoder(None if named else handle.settings.sources.get("decoder")):
        chosen = resolve(preset, handle.diffusion.visibility, options, policy)
        for part in chosen.policies:
            if type(part) is Function:
                name = "policies" if policy is None else "policy"
                check_function(name, "a function (view, choice) -> choice", part.function, 2)
        requests.check_support(chosen, handle.diffusion)
        requests.check_commands(chosen, model.config.vocab_size)
    tokenizer = tokenizer if tokenizer is not None else handle.tokenizer
    device, last_block = next(model.parameters()).device, options.get("last_block")
    return Decoder(handle, chosen, tokenizer, device, temperature, top_p, last_block)


def read_rows(decoder: Decoder, *, canvas: Any, temperature: Any = None, top_k: int, **arguments: Any) -> Requests:
    """The rows that the other arguments of `generate` describe, as the decoder opens them. Raises ValueError and
    TypeError; nothing has been decoded."""
    handle, config = decoder.handle, decoder.handle.model.config
    batch = requests.read(
        handle.diffusion,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        limit=handle.max_positions,
        tokenizer=decoder.tokenizer,
        canvas=canvas,
        temperature=decoder.temperature if temperature is None else temperature,
        top_k=top_k,
        top_p=decoder.top_p,
        **arguments,
    )
    check_greedy(decoder.preset, batch.temperature, batch.top_k, batch.top_p)
    if canvas is None:
        return requests.with_last_blocks(batch, decoder.preset, handle.diffusion, decoder.room)
    if decoder.last_block is not None:
        raise ValueError(
            f"generate: last_block goes with prompts; a canvas ends where it ends, got "
            f"last_block={shown(decoder.last_block)}"
        )
    return batch


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `generate` that nothing is wrong with; nothing has been decoded.

    Attributes:
        decoder: the model and its decoder.
        batch: the rows.
    """

    decoder: Decoder
    batch: Requests


def read_call(
    model: nn.Module,
    prompts: Sequence[Any] | None,
    *,
    canvas: Sequence[Any] | Tensor | None,
    preset: str | Preset | None,
    policy: Any,
    temperature: float | Sequence[float] | None,
    top_p: float | None,
    tokenizer: Any,
    options: Mapping[str, Any],
    **arguments: Any,
) -> Call:
    """Checks the model and all that a call asks for; the arguments are those of `generate`, and so are the errors."""
    decoder = read_decoder(
        model, preset=preset, policy=policy, temperature=temperature, top_p=top_p, tokenizer=tokenizer, options=options
    )
    return Call(decoder, read_rows(decoder, prompts=prompts, canvas=canvas, **arguments))


def settled(handle: PatchHandle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with those that they leave to the model: where no preset is named, those of the published
    decoder of the model's family."""
    known = handle.settings
    decoder = known.decoder if known is not None and settings.get("preset") is None else None
    found = dict(settings) if decoder is None else {**decoder.options, **settings, "preset": decoder.preset}
    for name, default in (("temperature", 0.0), ("top_p", 1.0)):
        if found.get(name) is None:
            found[name] = default if decoder is None else getattr(decoder, name)
    return found


@contextlib.contextmanager
def _unnamed_decoder(source: str | None) -> Iterator[None]:
    """Says of an error that the call did not name the decoder that it speaks of, and where the decoder comes from."""
    try:
        yield
    except RecursionError as error:
        raise ValueError("generate: policy and policies must be lists of policies, got lists in lists") from error
    except ValueError as error:
        if source is None:
            raise
        raise ValueError(f"{error} (the decoder is that of {source}, since the call names no preset)") from error


def check_mode(model: nn.Module) -> None:
    """Raises ValueError where a decode would not compute what the model computes.

    That is the case if a module is in training mode (dropout), and under autocast.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = "" if model.training else f" in {training[0]}"
        raise ValueError(f"generate: the model must be in eval mode, got training=True{where}; call model.eval()")
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        raise ValueError(
            f"generate: autocast must be off, got torch.autocast({device!r}, {torch.get_autocast_dtype(device)}); "
            f"decode under torch.autocast({device!r}, enabled=False), and a model of that dtype for its speed"
        )


def check_greedy(preset: Preset, temperature: Sequence[float], top_k: int, top_p: float) -> None:
    """Raises ValueError for draws or filters that a decoder of greedy predictions cannot make."""
    if preset.drafts > 1 and any(t > 0 for t in temperature):
        raise ValueError(
            f"generate: drafts are lossless for greedy decoding only, got temperature={max(temperature):g}"
        )
    if any(policy.greedy_only for policy in preset.policies) and (any(temperature) or top_k or top_p < 1):
        got = f"temperature={max(temperature, default=0.0):g}, top_k={top_k}, top_p={top_p}"
        raise ValueError(f"generate: preset {preset.name} decodes greedily, got {got}")


def check_cancel(cancel: Any) -> None:
    """Raises TypeError for what cannot say that a call is cancelled."""
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise TypeError(f"generate: cancel must have is_set(), as a threading.Event has, got cancel={shown(cancel)}")


def check_function(name: str, rule: str, function: Any, count: int) -> None:
    """Raises TypeError for what cannot be called with `count` arguments, as far as Python can tell."""
    is_called = callable(function)
    if is_called:
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError:
            is_called = False
        except ValueError:  # a function in C may not say what it takes
            pass
    if not is_called:
        raise TypeError(f"generate: {name} must be {rule}, got {name}={shown(function)}")
