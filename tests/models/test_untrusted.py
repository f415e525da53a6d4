"""Files that nobody trusts: what a checkpoint, an adapter or a head says runs no code, asks no network, opens nothing
but regular files of its own folder, and costs no more time or memory than its size."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network
import published
import pytest
import remote_models
import safetensors.torch
import torch
from helpers import native_model, random_prompts, save_toy_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.quantizers import auto as quantizers

import dlm_fast
from dlm_fast import CheckpointError, files, loading
from dlm_fast.adapters import check_pattern
from dlm_fast.files import EMBEDDED, MAX_HEADER, MAX_TEXT, MAX_TOKENIZER
from dlm_fast.policies.heads import FIELDS, HEADS

KERNEL = "kernels-community/flash-attn3"
# What a configuration may say so that somebody fetches or runs code, also inside of configurations in it.
IMPLEMENTATIONS = {
    name: KERNEL
    for kind in ("attn", "experts", "mlp")
    for name in (f"{kind}_implementation", f"_{kind}_implementation", f"_{kind}_implementation_internal")
}
REMOTE = {
    **IMPLEMENTATIONS,
    "use_kernels": True,
    "text_config": IMPLEMENTATIONS,
    "vision_config": {**IMPLEMENTATIONS, "model_type": "siglip"},
    "sub_configs": {"text_config": IMPLEMENTATIONS},
    "trust_remote_code": True,
    "custom_generate": "someone/decoder",
    "_name_or_path": "someone/model",
    "_commit_hash": "0" * 40,
}
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\nraise SystemExit('remote code ran')\n"


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails what takes longer, also where it waits for a file."""

    def fail(*args: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path):
    save_toy_checkpoint(tmp_path / "toy")
    return tmp_path / "toy"


def load(path, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is unproven")
        return dlm_fast.load(path, backend="reference", device="cpu", **kwargs)


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))


def poison(path: Path) -> None:
    """Makes every file of a folder say that code is to be fetched and run."""
    for name in ("code", "configuration", "modeling", "tokenization", "processing"):
        (path / f"{name}.py").write_text(CODE)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(CODE)
    values = json.loads((path / "config.json").read_text())
    remote = {
        "AutoModel": "modeling.Model",
        **(values.get("auto_map") or {}),
        "AutoConfig": "someone/model--code.Config",
    }
    edit(path / "config.json", **REMOTE, auto_map=remote)
    tokenizer = {"AutoTokenizer": ["someone/model--tokenization.Slow", "someone/model--tokenization.Fast"]}
    edit(path / "tokenizer_config.json", auto_map=tokenizer, trust_remote_code=True, processor_class="Processor")
    edit(path / "generation_config.json", custom_generate="someone/decoder", trust_remote_code=True)
    for name in ("processor_config.json", "preprocessor_config.json"):
        edit(path / name, auto_map={"AutoProcessor": "processing.Processor"}, processor_class="Processor")


# Code and the network


@pytest.mark.parametrize("family", sorted(published.FAMILIES))
def test_no_file_of_a_family_makes_anybody_fetch_or_run_code(tmp_path, family):
    checkpoint = published.write(family, tmp_path / (f"{family}-mdlm" if "a2d" in family else family))
    poison(checkpoint.folder)
    with network.refused() as asked:
        model = load(checkpoint.folder)
        dlm_fast.inspect_checkpoint(checkpoint.folder)
        out = dlm_fast.generate(model, ["ab"], max_new_tokens=2)
    assert asked == [] and out.text is not None and not list(checkpoint.folder.rglob("ran"))
    assert type(model).__module__.startswith("transformers.models.")
    dlm_fast.handle_of(model).unpatch()
    assert model.config._attn_implementation == "sdpa" and model.config._experts_implementation != KERNEL


def test_no_file_of_a_model_in_transformers_layout_does_either(folder):
    poison(folder)
    with network.refused() as asked:
        model = load(folder)
        dlm_fast.inspect_checkpoint(folder)
        dlm_fast.generate(model, ["abc"], max_new_tokens=2)
        dlm_fast.handle_of(model).unpatch()
        with dlm_fast.patch(model, backend="reference"):
            dlm_fast.generate(model, random_prompts([3]), max_new_tokens=2)
    assert asked == [] and not list(folder.rglob("ran"))


def test_no_configuration_of_a_model_in_memory_does(tmp_path):
    owner = remote_models.opened(published.write("llada", tmp_path / "llada", **IMPLEMENTATIONS))
    with network.refused() as asked, dlm_fast.patch(owner, tokenizer=None, backend="reference"):
        dlm_fast.generate(owner, random_prompts([3]), max_new_tokens=2)
        dlm_fast.explain(owner)
    assert asked == []


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_asks_nobody(name):
    with network.refused() as asked:
        dlm_fast.inspect_checkpoint(name)
        dlm_fast.generate(dlm_fast.load(name, device="cpu"), ["Add 3 and 4"], max_new_tokens=4)
    assert asked == []


def test_adapters_and_heads_ask_nobody(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="an adapter is made and merged by peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(native_model(), config).save_pretrained(tmp_path / "adapter")
    remote = {"base_model_class": "Model", "parent_library": "code"}
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="someone/model", auto_mapping=remote)
    with network.refused() as asked:
        for merge in (True, False):
            model = load(folder, adapter=tmp_path / "adapter", merge_adapter=merge)
            dlm_fast.generate(model, ["abc"], max_new_tokens=2)
        dlm_fast.inspect_checkpoint(folder, adapter=tmp_path / "adapter")
        for name in ("tiny-filter", "tiny-commit"):
            dlm_fast.load_head(name, device="cpu")
    assert asked == []


def test_a_template_calls_nothing_but_what_jinja_lets_it(folder):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    (folder / "chat_template.jinja").write_text(template)
    with network.refused() as asked:
        model = load(folder)
        with pytest.raises(Exception, match="(?i)access to attribute|unsafe"):
            dlm_fast.generate(model, [[{"role": "user", "content": "hi"}]], max_new_tokens=2)
    assert asked == [] and not list(folder.rglob("ran"))


def fetches(module: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a module of transformers fetches kernels, itself or by what it takes from other integrations."""
    path = Path(quantizers.__file__).parents[1] / "integrations" / f"{module}.py"
    if module in seen or not path.is_file():
        return False
    return any(call in path.read_text() for call in (" get_kernel(", " lazy_load_kernel("))


def test_every_quantisation_that_may_fetch_a_kernel_needs_to_be_asked_for():
    methods = {}
    for method, quantizer in quantizers.AUTO_QUANTIZER_MAPPING.items():
        source = Path(inspect.getfile(quantizer)).read_text()
        used = {line.split("integrations")[1].split(" import")[0].strip(". ") for line in source.splitlines()
                if "integrations" in line and " import" in line}  # fmt: skip
        named = {name for name in used if name} | {
            path.stem
            for path in (Path(quantizers.__file__).parents[1] / "integrations").glob("*.py")
            if "from ..integrations import" in source and path.stem in source
        }
        methods[method] = any(fetches(name.split(".")[0]) for name in named)
    assert {method for method, fetching in methods.items() if fetching} <= set(loading._FETCHING)
    assert set(loading._FETCHING) <= set(methods)


@pytest.mark.parametrize("method", loading._FETCHING)
def test_a_quantisation_that_fetches_is_refused_unless_asked_for(folder, method):
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name], weights[f"{name}_scale_inv"] = weights[name].to(torch.int8), torch.ones(1)
    save_file(weights, path, metadata={"format": "pt"})
    edit(folder / "config.json", quantization_config={"quant_method": method})
    with (
        network.refused() as asked,
        pytest.raises(NotImplementedError, match=f"quant_method '{method}' of config.json"),
    ):
        load(folder)
    assert asked == []


# Files


def test_the_links_of_a_local_cache_are_opened(folder, tmp_path):
    expected = dlm_fast.generate(load(folder), ["abc"], max_new_tokens=3).text
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:040}", snapshot))
    assert dlm_fast.generate(load(snapshot), ["abc"], max_new_tokens=3).text == expected


@pytest.mark.parametrize("name", ["..", ".", "", "a/b.safetensors", "/dev/zero", "\0", 5, None, ["model.safetensors"]])
def test_an_index_names_files_of_its_folder_alone(folder, name):
    weights = {"weight_map": {"lm_head.weight": "model.safetensors", "model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(CheckpointError, match="weight_map must name files of this folder, got the name"):
        load(folder)


@pytest.mark.parametrize(
    "index", [{"a": 5}, ["x"], [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, 5]
)
def test_an_index_that_is_none_is_named(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json .*got"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"gguf_file": "../other.gguf"},
        {"init_inputs": ["/etc/passwd"]},
        {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]},
        {"fast_tokenizer_files": "tokenizer.4.0.0.json"},
    ],
)
def test_a_tokenizer_reads_files_of_its_folder_alone(folder, change):
    edit(folder / "tokenizer_config.json", **change)
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} of tokenizer_config.json must .*, got"):
        load(folder)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file"])
def test_a_path_in_a_tokenizers_configuration_is_not_opened(folder, tmp_path, key):
    os.mkfifo(tmp_path / "elsewhere")
    edit(folder / "tokenizer_config.json", **{key: str(tmp_path / "elsewhere")})
    with within(20):
        assert dlm_fast.handle_of(load(folder)).tokenizer.encode("abc") == [2, 3, 4]


READ = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "adapter_config.json", "adapter_model.safetensors", "tekken.json",
    "additional_chat_templates/tool.jinja",
)  # fmt: skip


def put(path: Path, kind: str) -> None:
    """Puts something that is no file at a path."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "a fifo":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        bound = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        bound.bind(path.name)
        os.chdir(here)
        bound.close()
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize("kind", ["a fifo", "a device", "a folder", "a socket", "a link to nothing"])
@pytest.mark.parametrize("name", READ)
def test_what_is_no_regular_file_is_refused_by_name_and_never_waited_for(folder, name, kind):
    put(folder / name, kind)
    for opened in (load, dlm_fast.inspect_checkpoint):
        with (
            within(10),
            pytest.raises(CheckpointError, match=f"{Path(name).name} .*must be a regular file, got {kind}"),
        ):
            opened(folder)


@pytest.mark.parametrize("kind", ["a fifo", "a device", "a folder", "a socket", "a link to nothing"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_regular_files_too(folder, tmp_path, name, kind):
    other = {"adapter_config.json", "adapter_model.safetensors"} - {name}
    put(tmp_path / "adapter" / name, kind)
    (tmp_path / "adapter" / other.pop()).write_text("{}")
    with within(10), pytest.raises(CheckpointError, match=f"{name} .*must be a regular file, got {kind}"):
        load(folder, adapter=tmp_path / "adapter")


def test_a_link_to_itself_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match="config.json of .* must be a regular file, got a link to nothing"):
        load(folder)


@pytest.mark.parametrize("name", ["vocab", "merges"])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_vocabulary_elsewhere_is_not_opened(folder, tmp_path, name, kind):
    os.mkfifo(tmp_path / "elsewhere")  # which would hang whoever opens it
    (folder / "tokenizer.json").unlink()
    values = {"tokenizer_class": kind, name: str(tmp_path / "elsewhere")}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    with (
        within(10),
        pytest.raises(CheckpointError, match=f"{name} of tokenizer_config.json must stand in a file of the"),
    ):
        load(folder)


SLOW = [
    r"([a-z._0-9]+)+!",
    r"(.*)*x",
    r"(a|a){30}!",
    "(.|.)" * 40 + "!",
    ".?" * 40 + "!",
    ".*" * 20 + "!",
    "x{1,9}" * 20 + "!",
    "a" * 5000,
]


@pytest.mark.parametrize("pattern", SLOW, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_for_ever_is_refused(folder, tmp_path, pattern, field):
    adapter_folder = tmp_path / "adapter"
    adapter_folder.mkdir()
    save_file({}, adapter_folder / "adapter_model.safetensors")
    values = {field: {pattern: 8} if field.endswith("pattern") else pattern}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(values))
    for call in (load, dlm_fast.inspect_checkpoint):
        with within(10), pytest.raises(CheckpointError, match=f"{field} of .* must hold patterns of at most"):
            call(folder, adapter=adapter_folder)


def test_a_pattern_of_a_quantisation_is_bounded_too(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    section = {"quant_method": "compressed-tensors", "ignore": [r"re:([a-z._0-9]+)+!"]}
    edit(folder / "config.json", quantization_config=section)
    rule = "quantization_config.ignore of config.json must hold patterns of at most"
    with within(10), pytest.raises(CheckpointError, match=rule):
        load(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"model\.layers\.[0-9]{1,2}\.mlp\.(up|down|gate)_proj",
        r".*?(?:self_attn|mlp).*?(?:k_proj|v_proj)",
        "a(b)?[(*+)]*",
    ],
)
def test_a_pattern_that_adapters_have_is_taken(pattern):
    check_pattern("target_modules", pattern)


@pytest.mark.parametrize("kind", ["a fifo", "a device", "a folder", "a socket", "a link to nothing"])
def test_a_head_is_a_regular_file_too(tmp_path, kind):
    put(tmp_path / "head.safetensors", kind)
    with within(10), pytest.raises(CheckpointError, match=r"head must be a \*.safetensors file .*, got '"):
        dlm_fast.load_head(tmp_path / "head.safetensors")


# Sizes


def hole(path: Path, size: int) -> None:
    """A file of a size that takes no disk."""
    with path.open("wb") as file:
        file.truncate(size)


def test_files_that_are_too_large_are_refused_before_they_are_read(folder):
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        hole(folder / name, 2**30)
        with (
            within(5),
            pytest.raises(CheckpointError, match=f"{name}.* must have at most {MAX_TEXT} bytes, got {2**30}"),
        ):
            load(folder)
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        hole(folder / name, 2**30)
        with (
            within(5),
            pytest.raises(CheckpointError, match=f"{name} of .* at most {MAX_TOKENIZER} bytes, got {2**30}"),
        ):
            load(folder)
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    load(folder)


@pytest.mark.parametrize("text", ["[" * 10**5, "[" * 10**5 + "]" * 10**5, '{"a":' * 500 + "1" + "}" * 500, "1" * 10**5])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_deep_json_is_refused(folder, name, text):
    if name == "tokenizer.json":
        (folder / name).write_text(text)
    else:
        values = (folder / name).read_text().rstrip().removesuffix("}")
        (folder / name).write_text(f'{values}, "deep": {text}}}')
    with within(5), pytest.raises(CheckpointError, match=f"({name}|the tokenizer of).*got"):
        load(folder)


def header(length: int, text: bytes, data: int = 0) -> bytes:
    return length.to_bytes(8, "little") + text + bytes(data)


LYING = {
    "no length": b"\1\2\3",
    "a length of 2^62": header(2**62, b"{}"),
    "a length beyond the file": header(10**6, b"{}"),
    "a length of 90 MB": header(90 * 2**20, b"{}"),
    "a tensor beyond the file": header(61, b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'.ljust(61)),
    "an endless shape": header(
        81, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}'.ljust(81), 4
    ),
    "negative offsets": header(60, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'.ljust(60)),
    "deep metadata": header(2 * 10**5, b"[" * 10**5 + b"]" * 10**5),
}


@pytest.mark.parametrize("content", LYING.values(), ids=LYING)
def test_a_lying_header_is_refused(folder, content):
    for path, opened in (
        (folder / "model.safetensors", lambda: load(folder)),
        (folder / "head.safetensors", lambda: dlm_fast.load_head(folder / "head.safetensors")),
    ):
        path.write_bytes(content)
        with within(5), pytest.raises(CheckpointError, match=f"{path.name} is not a readable safetensors file, got"):
            opened()
        path.unlink()


def test_a_header_of_90_megabytes_is_refused_before_it_is_read(folder):
    size = 90 * 2**20
    with (folder / "model.safetensors").open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(8 + size)
    with (
        within(2),
        pytest.raises(CheckpointError, match=f"a header of {size} bytes, of which there may be {MAX_HEADER}"),
    ):
        load(folder)


SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip


WRONG = (10**9, 10**12, 10**30, 0.5, -1, "8", [8], True, {"a": 1})
# A billion positions are no more than a number, and within int32.
WRONG_SIZES = [
    (name, value) for name in SIZES for value in WRONG if (name, value) != ("max_position_embeddings", 10**9)
]


@pytest.mark.parametrize("name, value", WRONG_SIZES, ids=str)
def test_a_size_that_no_model_has_is_refused_at_once(folder, name, value):
    edit(folder / "config.json", **{name: value})
    for opened in (load, dlm_fast.inspect_checkpoint):
        with within(3), pytest.raises(CheckpointError, match=f"config.json describes no llama model: {name} must be "):
            opened(folder)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("sdar-moe", {"num_experts": 10**9}),
        ("sdar-moe", {"num_experts": 4096, "num_hidden_layers": 1024}),
        ("llada2", {"num_experts": 10**12}),
        ("llada2", {"num_shared_experts": 10**9}),
        ("llada", {"n_layers": 10**9}),
        ("llada", {"d_model": 10**12}),
        ("llada", {"mlp_ratio": float("inf")}),
        ("llada-moe", {"expert_intermediate_size": 10**12}),
        ("rnd1", {"decoder_sparse_step": 10**9}),
    ],
)
def test_a_published_size_that_no_model_has_is_refused_at_once(tmp_path, family, changes):
    checkpoint = published.write(family, tmp_path / family)
    edit(checkpoint.folder / "config.json", **changes)
    name = next(iter(changes))
    with within(3), pytest.raises(CheckpointError, match=f"config.json describes no .* model: {name} must be .*, got"):
        load(checkpoint.folder)


def test_the_largest_configuration_that_is_allowed_is_told_from_its_tensors_in_time(folder):
    edit(folder / "config.json", num_hidden_layers=1024)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="missing keys"):
        load(folder)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name, value", [("block_length", 10**12), ("width", 10**12), ("accept_threshold", "nan")])
def test_a_head_of_a_size_that_none_has_is_refused_at_once(tmp_path, name, value):
    source = HEADS / "tiny-filter.safetensors"
    content = source.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = {**json.loads(content[8 : 8 + length])["__metadata__"], name: str(value)}
    (tmp_path / "head.safetensors").write_bytes(safetensors.torch.save(load_file(source), metadata))
    assert name in FIELDS
    with within(2), pytest.raises(CheckpointError, match=f"{name} of .*, got {name}='{value}'"):
        dlm_fast.load_head(tmp_path / "head.safetensors")


def test_a_hostile_configuration_allocates_nothing(folder):
    edit(folder / "config.json", hidden_size=2**20, intermediate_size=2**20, vocab_size=2**24, head_dim=2**18)
    code = (
        "import resource, sys, dlm_fast; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: dlm_fast.load({str(folder)!r}, backend='reference', device='cpu')\n"
        "except dlm_fast.CheckpointError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 100_000  # KiB


def test_what_is_opened_is_what_the_files_say(folder):
    assert isinstance(load(folder), LlamaForCausalLM)
    assert files.kind_of(folder / "config.json") is None and files.kind_of(folder / "none") == "no file"
