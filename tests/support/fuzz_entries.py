"""Calls of every public entry and files of every kind, each with exactly one thing wrong, and what must come of them.

A case is a valid call of an entry of `dlm_fast.__all__` of which one argument is damaged, or a valid checkpoint,
adapter or head of which one field is. What must come of it is a named error that names the argument or the file
(named_errors.py), with nothing written: the model bitwise as before and patched as before, the files as before, and
nobody asked on the network. A value that an argument may have (`legal`) may be taken instead.

    python tests/support/fuzz_entries.py PART PARTS     runs a part of the cases, a JSON line for each
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import inspect
import json
import math
import os
import random
import shutil
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import network
import published
import torch
from helpers import native_model, save_toy_checkpoint, toy, toy_tokenizer
from named_errors import unnamed
from safetensors.torch import load_file, save_file

import dlm_fast
from dlm_fast import policies
from dlm_fast.policies.heads import FIELDS as HEAD_FIELDS
from dlm_fast.policies.heads import HEADS
from dlm_fast.presets import FIELDS, resolve

# Wrong kinds of value, at least for one argument.
WRONG: dict[str, Any] = {
    "None": None,
    "an empty list": [],
    "a list of None": [None],
    "a list of a text": ["x"],
    "an object": {"a": 1},
    "bytes": b"x",
    "True": True,
    "NaN": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "10^30": 10**30,
    "a number of 5,001 digits": 10**5000,
    "an empty text": "",
    "a text": "no such",
    "half a character": "\ud800",
    "a set": {1},
    "a tensor": torch.ones(2, 3),
    "object()": object(),
    "a class": dict,
}
# As the value of a field: the field is not there.
ABSENT = object()
# Those that a JSON file can hold, and some that only a file has.
IN_FILES = {
    name: value
    for name, value in WRONG.items()
    if isinstance(value, (type(None), list, dict, bool, int, float, str)) and name != "a number of 5,001 digits"
} | {"a deep list": json.loads("[" * 70 + "]" * 70), "a long text": "x" * 10**5, "absent": ABSENT}

# Names of `dlm_fast.__all__` that are no calls of a user, and why.
NO_ENTRIES = {
    "CPU": "a value",
    "PRESETS": "a value",
    "REFERENCE": "a value",
    "__version__": "a value",
    "policies": "a module, whose entries are here",
    "Block": "made by a session",
    "Completion": "made by a session",
    "GenerateOutput": "made by generate",
    "Request": "read by a session, whose result says what is wrong with one (tests/decoding/test_session.py)",
    "Trajectories": "made by trajectories",
    "trajectories": "refuses what is no list of completions (tests/decoding/test_rollouts.py)",
    "PatchHandle": "made by patch",
}
NO_POLICIES = {
    "Choice": "made by the loop",
    "Head": "has no network of its own",
    "Lanes": "made by the loop",
    "Policy": "has no fields",
    "Sampling": "made by the loop",
    "Setting": "made by the loop",
    "View": "made by the loop",
    "load_head": "stands in dlm_fast.__all__",
}

Legal = Callable[[Any], bool]


def never(value: Any) -> bool:
    return False


def always(value: Any) -> bool:
    return True


def is_none(value: Any) -> bool:
    return value is None


def whole_from(low: int) -> Legal:
    return lambda value: value is None or (type(value) is int and low <= value < 2**24)


def one_of(*kinds: type) -> Legal:
    return lambda value: type(value) in kinds


def equal_to(*values: Any) -> Legal:
    return lambda value: any(type(value) is type(other) and value == other for other in values)


def empty_or_none(value: Any) -> bool:
    """None, an empty list, or a list of None, which is an empty one where policies are listed."""
    return value is None or (isinstance(value, (list, tuple)) and not any(value))


def positive(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public entry with a valid call.

    Attributes:
        function: what is called.
        arguments: valid arguments, by name.
        legal: for every argument of its signature, the values that it may have.
        called: what errors call an argument besides its name.
        left: arguments and kinds of value that are not tried.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    legal: Mapping[str, Legal]
    called: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    left: frozenset[tuple[str, str]] = frozenset()

    def missing(self) -> set[str]:
        """Arguments of the signature that the table of damages does not have."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - set(self.legal)

    def names(self) -> list[str]:
        """The arguments that are damaged."""
        known = inspect.signature(self.function).parameters
        return [name for name in self.legal if name in known]


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated type, so that it may be taken."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is typing.Literal:
        return value in inside
    if origin is not None and origin in (typing.Union, types.UnionType):
        return any(fits(each, value) for each in inside)
    if origin is tuple:
        return isinstance(value, tuple) or (isinstance(value, list) and bool(value) is False)
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        return callable(value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def of_fields(kind: type) -> dict[str, Legal]:
    """The values that the fields of a dataclass may have, by their annotations."""
    hints = typing.get_type_hints(kind)
    return {field.name: (lambda value, hint=hints[field.name]: fits(hint, value)) for field in dataclasses.fields(kind)}


LOADING: dict[str, Legal] = {
    "path_or_id": never,
    "revision": is_none,
    "diffusion": is_none,
    "dtype": is_none,
    "device": is_none,
    "device_map": is_none,
    "tp_plan": is_none,
    "quantization_config": is_none,
    "backend": never,
    "rope_scale": lambda value: type(value) in (int, float) and 1 <= value < 2**16,
    "adapter": is_none,
    "merge_adapter": one_of(bool),
    "fuse_layers": lambda value: value is None or type(value) is bool,
    "max_positions": whole_from(1),
    "max_rows": whole_from(1),
}
PATCHING = ("diffusion", "backend", "fuse_layers", "max_positions", "max_rows")
GENERATING: dict[str, Legal] = {
    "model": never,
    "prompts": equal_to([], ["x"]),
    "canvas": is_none,
    "attention_mask": is_none,
    "preset": is_none,
    "policy": empty_or_none,
    "max_new_tokens": whole_from(1),
    "min_new_tokens": lambda value: type(value) is int and 0 <= value < 5,
    "temperature": lambda value: value is None or (type(value) in (int, float) and 0 <= value < 1e3),
    "top_k": lambda value: type(value) is int and value >= 0,
    "top_p": is_none,
    "seed": lambda value: type(value) is int and 0 <= value < 2**63,
    "request_ids": is_none,
    "stop_strings": lambda value: empty_or_none(value) or isinstance(value, (str, list, set)),
    "banned_token_ids": equal_to(None, [], {1}),
    "eos_token_ids": equal_to(None, [], {1}),
    "tokenizer": is_none,
    "batch_size": whole_from(1),
    "on_step": is_none,
    "cancel": is_none,
}


SESSION: dict[str, Legal] = {
    **{name: GENERATING[name] for name in (
        "model", "preset", "policy", "min_new_tokens", "temperature", "top_k", "top_p", "seed", "stop_strings",
        "banned_token_ids", "eos_token_ids", "tokenizer",
    )},
    "slots": lambda value: type(value) is int and 1 <= value < 2**24,
    "max_positions": lambda value: value is None or (type(value) is int and 4 < value <= 256),
    "max_new_tokens": lambda value: type(value) is int and 1 <= value < 32,
    "infill": one_of(bool),
    "share_prefixes": equal_to(False),
    "page_size": lambda value: type(value) is int and value >= 32 and not value & (value - 1),
    "cache_positions": is_none,
    "memory": lambda value: value is None or (type(value) is int and value > 2**28),
    "lengths": empty_or_none,
}  # fmt: skip


class Scene:
    """Valid calls, and the model and files that they use.

    Attributes:
        entries: every entry by its name.
        model: a patched toy.
        folder: a checkpoint of a toy, an adapter and a head.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "toy"
        save_toy_checkpoint(self.folder, layers=1, heads=2, kv_heads=1)
        self.model = toy(layers=1, heads=2, kv_heads=1)
        dlm_fast.handle_of(self.model).tokenizer = toy_tokenizer()
        self.native = native_model(layers=1, heads=2, kv_heads=1)
        self.head = root / "head.safetensors"
        shutil.copy(HEADS / "tiny-filter.safetensors", self.head)
        self.entries = {**self._functions(), **self._dataclasses(), **self._policies()}

    def _functions(self) -> dict[str, Entry]:
        def decoded(**arguments: Any) -> Any:
            return dlm_fast.generate(**arguments)

        decoded.__signature__ = inspect.signature(dlm_fast.generate)

        def decoded_canvas(model: Any, canvas: Any, preset: str) -> Any:
            return dlm_fast.generate(model, canvas=canvas, preset=preset)

        def patched(**arguments: Any) -> None:
            dlm_fast.patch(**arguments).unpatch()

        patched.__signature__ = inspect.signature(dlm_fast.patch)
        small = {"path_or_id": self.folder, "device": "cpu"}
        diffusion = dlm_fast.DiffusionConfig(mask_token_id=0, eos_token_ids=(1,), visibility="full")
        return {
            "generate": Entry(
                decoded,
                {"model": self.model, "prompts": ["abc"], "max_new_tokens": 3, "preset": "fast-dllm"},
                GENERATING,
                called={"max_new_tokens": ("its new tokens",)},
                left=frozenset(
                    {
                        ("on_step", "a class"),  # it is a function, and fails when it is called
                        ("prompts", "None"),  # the error is of the two arguments, of which one must be given
                        *(("canvas", kind) for kind in WRONG),  # has an entry of its own, without prompts
                    }
                ),
            ),
            "generate of a canvas": Entry(
                decoded_canvas,
                {"model": self.model, "canvas": [[5, 0, 0]], "preset": "fast-dllm"},
                {"canvas": equal_to([]), "model": never, "preset": never},
                left=frozenset([("canvas", "None"), ("preset", "None")]),
            ),
            "load": Entry(dlm_fast.load, {**small, "backend": "reference"}, LOADING, {"path_or_id": ("path",)}),
            "patch": Entry(
                patched,
                {"model": self.native, "diffusion": diffusion, "backend": "reference"},
                {**{name: LOADING[name] for name in PATCHING}, "model": never, "tokenizer": is_none},
            ),
            "Session": Entry(
                dlm_fast.Session,
                {"model": self.model, "max_positions": 32, "max_new_tokens": 4},
                SESSION,
            ),
            "handle_of": Entry(dlm_fast.handle_of, {"model": self.model}, {"model": never}),
            "explain": Entry(dlm_fast.explain, {"model": self.model}, {"model": never}),
            "inspect_checkpoint": Entry(
                dlm_fast.inspect_checkpoint,
                {"path_or_id": self.folder},
                {name: LOADING[name] for name in ("path_or_id", "revision", "diffusion", "dtype", "adapter")},
                {"path_or_id": ("path",)},
            ),
            "load_head": Entry(
                dlm_fast.load_head,
                {"name_or_path": self.head, "device": "cpu"},
                {"name_or_path": never, "device": is_none},
                {"name_or_path": ("head",)},
            ),
            "triton_ops": Entry(dlm_fast.triton_ops, {"reason": "a reason"}, {"reason": one_of(str)}),
            "save_head": Entry(
                policies.save_head,
                {"head": dlm_fast.load_head(self.head, device="cpu"), "path": self.root / "saved.safetensors"},
                {"head": never, "path": equal_to("no such")},
            ),
            "as_policies": Entry(
                policies.as_policies,
                {"policy": policies.Prophet(), "name": "policy"},
                {"policy": empty_or_none, "name": always},
            ),
        }  # fmt: skip

    def _dataclasses(self) -> dict[str, Entry]:
        preset = dlm_fast.PRESETS["fast-dllm"]

        def values_of(value: Any) -> dict[str, Any]:
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

        def replaced(**options: Any) -> None:
            dataclasses.replace(preset, **options)

        def resolved(**options: Any) -> None:
            resolve(preset, "full", options)

        def decoded(**options: Any) -> None:
            dlm_fast.generate(self.model, ["abc"], max_new_tokens=3, preset=preset, **options)

        legal = of_fields(dlm_fast.Preset)
        options = {name: legal[name] for name in FIELDS}
        options["policies"] = empty_or_none
        for function, names in ((replaced, legal), (resolved, options), (decoded, options)):
            function.__signature__ = inspect.Signature(
                [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
            )
        found = {
            "Preset": Entry(dlm_fast.Preset, values_of(preset), legal),
            "dataclasses.replace of a Preset": Entry(replaced, {}, legal),
            "resolve": Entry(resolved, {}, options),
            "generate(**options)": Entry(decoded, {}, options),
            "Ops": Entry(dlm_fast.Ops, values_of(dlm_fast.REFERENCE), of_fields(dlm_fast.Ops)),
        }
        diffusion = dlm_fast.DiffusionConfig(mask_token_id=0, eos_token_ids=(1,), visibility="full")
        found["DiffusionConfig"] = Entry(dlm_fast.DiffusionConfig, values_of(diffusion), of_fields(type(diffusion)))
        return found

    def _policies(self) -> dict[str, Entry]:
        found = {}
        for name in policies.__all__:
            kind = getattr(policies, name)
            if name in NO_POLICIES or not inspect.isclass(kind):
                continue
            if dataclasses.is_dataclass(kind):
                legal = of_fields(kind)
                needed = {"Function": {"function": print}, "InsertDelete": {"delete_id": 5, "split_id": 6}}
                found[name] = Entry(kind, needed.get(name, {}), legal)
            else:

                def made(kind: type = kind, **arguments: Any) -> None:
                    kind(**arguments)

                sizes = {"block_length": whole_from(1), "width": whole_from(1), "seed": whole_from(0)}
                sizes |= {"accept_threshold": one_of(int, float)}
                sizes |= {"trained_on": one_of(str), "step": whole_from(0)}
                made.__signature__ = inspect.signature(policies.Head)
                found[name] = Entry(made, {"block_length": 4, "width": 8}, sizes)
        return found


# Files


def ignored(*names: str) -> dict[str, Legal]:
    return dict.fromkeys(names, always)


# Fields of config.json that are about the file, the library or a run, of which nothing is read; and those that are for
# training. Every value is taken, and the model decodes.
UNREAD = ignored(
    "architectures", "auto_map", "attn_implementation", "_attn_implementation", "dtype", "output_attentions",
    "output_hidden_states", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    "_name_or_path", "made_up",
)  # fmt: skip
CONFIG: dict[str, dict[str, Legal]] = {
    "toy": {
        **UNREAD,
        **dict.fromkeys(
            ("attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size",
             "intermediate_size", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
             "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings", "vocab_size",
             "sliding_window", "use_sliding_window", "dlm"),
            is_none,
        ),
        "layer_types": empty_or_none,
        "attention_dropout": equal_to(None, 0),
        "initializer_range": lambda value: value == 0 or positive(value),
        "rms_norm_eps": positive,
        "rope_parameters": is_none,
        "rope_theta": positive,
        "rope_scaling": lambda value: not value,
        "quantization_config": is_none,
        "pad_token_id": equal_to(None, 0, -1),
        # The section `dlm` says which ids end a response; the fields are transformers' own.
        "eos_token_id": always,
        "bos_token_id": always,
        "dlm.mask_token_id": equal_to(None, 0),
        "dlm.eos_token_ids": empty_or_none,
        "dlm.visibility": never,
        "dlm.block_length": is_none,
        "dlm.block_alignment": is_none,
        "dlm.logits_row": is_none,
        "dlm.prompt_isolated": one_of(bool, type(None)),
        "dlm.causal_prefix": is_none,
        "dlm.decoder": is_none,
        "dlm.made_up": is_none,
    },
    "llada": {
        **UNREAD,
        **dict.fromkeys(
            ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size",
             "embedding_size", "max_sequence_length", "weight_tying", "mask_token_id",
             "block_type", "layer_norm_type", "activation_type", "alibi", "include_bias", "model_type", "clip_qkv"),
            is_none,
        ),
        "multi_query_attention": one_of(bool, type(None)),
        **dict.fromkeys(("mlp_ratio", "rms_norm_eps", "rope_theta"), positive),
    },
    "llada2": {
        **dict.fromkeys(
            ("head_dim", "hidden_size", "num_experts", "num_shared_experts", "num_experts_per_tok", "n_group",
             "topk_group", "first_k_dense_replace", "rotary_dim", "score_function", "moe_intermediate_size",
             "partial_rotary_factor", "rope_parameters", "use_qkv_bias", "hidden_act"),
            is_none,
        ),
        "routed_scaling_factor": positive,
    },
    "sdar-moe": {
        **dict.fromkeys(
            ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
             "block_size", "mask_token_id"),
            is_none,
        ),
        "mlp_only_layers": empty_or_none,
        "norm_topk_prob": one_of(bool, type(None)),
    },
}  # fmt: skip
# Fields of the other files; what transformers or peft takes is theirs.
OTHER_FILES: dict[str, tuple[str, ...]] = {
    "model.safetensors.index.json": ("weight_map", "weight_map.lm_head.weight", "metadata"),
    "tokenizer_config.json": (
        "tokenizer_class", "auto_map", "model_max_length", "eos_token", "mask_token", "added_tokens_decoder",
        "extra_special_tokens", "chat_template", "clean_up_tokenization_spaces", "fast_tokenizer_files", "init_inputs",
        "gguf_file", "backend", "padding_side", "vocab_file", "tokenizer_file", "name_or_path",
    ),
    "tokenizer.json": (
        "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
        "model", "model.type", "model.vocab", "model.unk_token", "model.vocab.a", "pre_tokenizer.pattern",
    ),
    "generation_config.json": (
        "mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "temperature", "top_k", "max_length",
        "custom_generate", "trust_remote_code", "do_sample", "cache_implementation", "compile_config",
    ),
    "adapter_config.json": (
        "r", "lora_alpha", "target_modules", "base_model_name_or_path", "peft_type", "task_type", "bias",
        "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules", "lora_dropout",
        "use_rslora", "auto_mapping", "fan_in_fan_out", "init_lora_weights", "revision", "corda_config", "eva_config",
        "use_dora",
    ),
}  # fmt: skip


# What else an error calls a file that is wrong.
NAMES_OF_FILES = ("tokenizer", "adapter", "configuration", "safetensors file")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    Attributes:
        where: an entry, or a kind of file with what it belongs to ("llada/config.json").
        field: the argument or the field; dots lead into objects.
        kind: a name of `WRONG` or `IN_FILES`.
    """

    where: str
    field: str
    kind: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field} = {self.kind}"


def cases(scene: Scene) -> list[Case]:
    """All of them, in a fixed order that is shuffled by a fixed seed."""
    found = [
        Case(name, argument, kind)
        for name, entry in scene.entries.items()
        for argument in entry.names()
        for kind in WRONG
        if (argument, kind) not in entry.left
    ]
    found += [
        Case(f"{checkpoint}/config.json", field, kind)
        for checkpoint, fields in CONFIG.items()
        for field in fields
        for kind in IN_FILES
    ]
    found += [Case(f"toy/{file}", field, kind) for file, fields in OTHER_FILES.items() for field in fields
              for kind in IN_FILES]  # fmt: skip
    found += [Case("head.safetensors", field, kind) for field in HEAD_FIELDS for kind in IN_FILES]
    random.Random(0).shuffle(found)
    return found


def fingerprint(scene: Scene) -> tuple:
    """What no refused call may change: the weights, how the models are patched, and the files."""
    models = (scene.model, scene.native)
    weights = [
        (name, tensor.shape, tensor.dtype, tensor.numpy().tobytes(), tensor.data_ptr())
        for model in models
        for name, tensor in model.state_dict().items()
    ]
    handles = [
        (id(model.__dict__.get("_dlm_fast_patch")), model.config._attn_implementation, len(model.model._forward_hooks))
        for model in models
    ]
    listing = [(str(path), path.read_bytes() if path.is_file() else b"") for path in sorted(scene.root.rglob("*"))]
    return weights, handles, listing


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        problem: what is wrong with it; None = nothing.
        refused: whether an error was raised.
    """

    problem: str | None
    refused: bool


def run(scene: Scene, case: Case) -> Outcome:
    """Runs a case, and compares everything that the case may not change."""
    before = fingerprint(scene)
    if case.where in scene.entries:
        problem, refused = _run_entry(scene, case)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            problem, refused = _run_file(scene, case, Path(temporary))
    for written in (scene.root / "saved.safetensors", Path("no such")):  # where save_head may write
        written.unlink(missing_ok=True)
    if problem is None and fingerprint(scene) != before:
        problem = "something was written"
    if network.asked:
        problem = f"the network was asked: {network.asked}"
        network.asked.clear()
    return Outcome(problem, refused)


def outcome(call: Callable[[], Any], named: tuple[str, ...], legal: bool) -> Outcome:
    """What comes of a call; `named` are the names of which an error has one."""
    try:
        call()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        problems = [unnamed(error, name) for name in named]
        return Outcome(None if None in problems else problems[0], True)
    return Outcome(None if legal else "was taken", False)


def _run_entry(scene: Scene, case: Case) -> Outcome:
    entry, value = scene.entries[case.where], WRONG[case.kind]
    arguments = {**entry.arguments, case.field: copy.copy(value)}
    named = (case.field, *entry.called.get(case.field, ()))
    return outcome(lambda: entry.function(**arguments), named, bool(entry.legal[case.field](value)))


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Puts a value into an object of a file, or takes the field out."""
    if value is ABSENT:
        values.pop(name, None)
    else:
        values[name] = value


def _damaged(path: Path, field: str, value: Any) -> None:
    """Writes a value into a field of a JSON file; dots lead into objects that there are."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    inside, name = values, field
    while "." in name and isinstance(inside.get(name.partition(".")[0]), dict):
        first, _, name = name.partition(".")
        inside = inside[first]
    put(inside, name, value)
    path.write_text(json.dumps(values))


def _checkpoint(scene: Scene, name: str, folder: Path) -> Path:
    if name == "toy":
        return Path(shutil.copytree(scene.folder, folder / name))
    kept = scene.root.with_name(f"{scene.root.name}-{name}")
    if not kept.exists():
        published.write(name, kept)
    return Path(shutil.copytree(kept, folder / name))


def _run_file(scene: Scene, case: Case, folder: Path) -> Outcome:
    checkpoint, _, file = case.where.rpartition("/")
    value = IN_FILES[case.kind]
    if file == "head.safetensors":
        return _run_head(scene, case, folder, value)
    path, arguments = _checkpoint(scene, checkpoint, folder), {}
    legal: Legal = always if file != "config.json" else CONFIG[checkpoint][case.field]
    if file == "model.safetensors.index.json":
        weights = load_file(path / "model.safetensors")
        (path / file).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
        # The index says which files there are; what they hold is said by their headers.
        legal = {"metadata": always, "weight_map": never}.get(case.field, is_none)
    if file == "adapter_config.json":
        arguments = {"adapter": _adapter(folder / "adapter")}
        _damaged(folder / "adapter" / file, case.field, value)
    else:
        _damaged(path / file, case.field, value)

    def opened() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dlm_fast.inspect_checkpoint(path, **arguments)
            model = dlm_fast.load(path, device="cpu", backend="reference", **arguments)
            dlm_fast.generate(model, [[5, 6]], max_new_tokens=2)

    before = {item: item.read_bytes() for item in folder.rglob("*") if item.is_file()}
    leaf = case.field.rpartition(".")[2]
    taken = bool(legal(None if value is ABSENT else value))  # null counts as absent
    found = outcome(opened, (leaf, file, *NAMES_OF_FILES), taken)
    if found.problem is None and {item: item.read_bytes() for item in folder.rglob("*") if item.is_file()} != before:
        return Outcome("a file was written", found.refused)
    return found


def _adapter(folder: Path) -> Path:
    """A LoRA adapter of the toy."""
    folder.mkdir()
    rank, model = 2, native_model(layers=1, heads=2, kv_heads=1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {
        f"{name}A.weight": torch.ones(rank, weight.shape[1]),
        f"{name}B.weight": torch.ones(weight.shape[0], rank),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _run_head(scene: Scene, case: Case, folder: Path, value: Any) -> Outcome:
    """A head whose metadata hold a value, as safetensors has metadata: as text, or as no text at all."""
    content = scene.head.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    put(header["__metadata__"], case.field, value)
    text = json.dumps(header).encode()
    path = folder / "head.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    legal = isinstance(value, str) if case.field == "trained_on" else False
    return outcome(lambda: dlm_fast.load_head(path, device="cpu"), (case.field, path.name), legal)


def run_all(wanted: list[Case], scene: Scene) -> Iterator[tuple[Case, Outcome]]:
    """Runs cases, one after another, on a network that nobody may ask."""
    with network.refused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in wanted:
            yield case, run(scene, case)


def main() -> None:
    part, parts = map(int, sys.argv[1:3])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)  # a call may write where it stands
        scene = Scene(Path(root) / "scene")
        for case, found in run_all(cases(scene)[part::parts], scene):
            print(json.dumps({"case": str(case), **found._asdict()}), flush=True)


if __name__ == "__main__":
    main()
