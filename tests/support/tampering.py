"""Ways to tamper with a training checkpoint, each with the name that the refusal must give.

A forged checkpoint has the right checksum of its wrong content, so that the checksum alone would let it pass.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dlm_fast.training import checkpoint

Change = Callable[[dict[str, str], dict[str, Tensor]], object]
Damage = Callable[[Path], object]


def forge(path: Path, change: Change) -> None:
    """Changes metadata and tensors of a checkpoint, and gives the file the checksum of what it then holds."""
    found = checkpoint.read(path)
    metadata, tensors = dict(found.metadata), dict(found.tensors)
    change(metadata, tensors)
    metadata["checksum"] = checkpoint._checksum(metadata, tensors)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def value(name: str, text: object) -> Change:
    """One field of the metadata is another text, or JSON."""
    return lambda metadata, tensors: metadata.update({name: text if isinstance(text, str) else json.dumps(text)})


def without(name: str) -> Change:
    """One field of the metadata is missing."""
    return lambda metadata, tensors: metadata.pop(name)


def entry(field: str, name: str, change: object) -> Change:
    """One entry of a JSON object in the metadata is another one; None takes the entry away."""

    def forged(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        values = json.loads(metadata[field])
        if change is None:
            del values[name]
        else:
            values[name] = change
        metadata[field] = json.dumps(values)

    return forged


def tensor(name: str, change: Callable[[Tensor], Tensor] | None) -> Change:
    """One tensor is another one; None takes the tensor away."""

    def forged(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name].clone())

    return forged


def filled(number: float) -> Callable[[Tensor], Tensor]:
    """The first number of a tensor is another one."""

    def change(values: Tensor) -> Tensor:
        values.view(-1)[0] = number
        return values

    return change


def drop(prefix: str) -> Change:
    """All tensors whose names begin with a prefix are missing."""
    return lambda metadata, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)]


def forget_steps(prefix: str) -> Change:
    """An optimizer's whole state is missing, and the metadata say that it has never stepped."""

    def forged(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        places = {".".join(name.split(".")[:2]) for name in tensors if name.startswith(prefix)}
        drop(prefix)(metadata, tensors)
        metadata["unstepped"] = json.dumps(sorted(places))

    return forged


def of_metadata(fields: set[str]) -> dict[str, tuple[Change, str]]:
    """Each field missing and each field broken."""
    cases: dict[str, tuple[Change, str]] = {}
    for field in sorted(fields | {"unstepped"}):
        cases[f"{field} missing"] = without(field), "kind" if field == "kind" else field
        if field != "kind":
            cases[f"{field} no JSON"] = value(field, "{]"), field
            cases[f"{field} of the wrong type"] = value(field, '"text"'), field
    cases["a field more"] = value("note", "1"), "note"
    cases["unstepped of another optimizer"] = value("unstepped", ["sgd.0"]), "unstepped"
    cases["unstepped nested"] = value("unstepped", "[" * 100_000), "unstepped"
    for step in ("-5", "1000000000", "1.5", "true", "null", "NaN"):
        cases[f"step {step}"] = value("step", step), "step"
    # All else in the checkpoint is of a later step.
    cases["step 0"] = value("step", "0"), "step 0" if "loss_average" not in fields else "loss_average"
    return cases


def of_tensors(names: list[str]) -> dict[str, tuple[Change, str]]:
    """Each class of tensor missing, unexpected, not finite, of another dtype, of another shape."""
    cases: dict[str, tuple[Change, str]] = {}
    for name in names:
        cases[f"{name} missing"] = tensor(name, None), name
        cases[f"{name} NaN"] = tensor(name, filled(float("nan"))), name
        cases[f"{name} inf"] = tensor(name, filled(float("-inf"))), name
        cases[f"{name} float64"] = tensor(name, Tensor.double), name
        cases[f"{name} int64"] = tensor(name, Tensor.long), name
        cases[f"{name} longer"] = tensor(name, lambda t: torch.cat([t.reshape(-1), torch.ones(1)])), name
        if name.endswith(".step"):
            for step in (-1.0, 0.0, 1.5, 99.0):
                cases[f"{name} {step}"] = tensor(name, filled(step)), name
        if name.endswith(".exp_avg_sq"):
            cases[f"{name} negative"] = tensor(name, filled(-1.0)), name
    for owner in sorted({name.split(".")[0] for name in names}):
        extra = f"{owner}.0.another"
        cases[f"{extra} besides"] = lambda metadata, tensors, n=extra: tensors.update({n: torch.ones(1)}), extra
        cases[f"all of {owner} missing"] = drop(f"{owner}."), "tensors"
        if owner != "model":
            cases[f"{owner} forgotten"] = forget_steps(f"{owner}."), "unstepped"
            far = f"{owner}.9999.step"
            cases[f"{owner} of a parameter more"] = lambda m, tensors, n=far: tensors.update({n: torch.ones(())}), far
    cases["a tensor of no owner"] = lambda metadata, tensors: tensors.update(stray=torch.ones(1)), "stray"
    return cases


def header_of(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and where the data begin."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def cut(place: Callable[[int, int], int]) -> Damage:
    """The file ends early, at a place that is reckoned from where its data begin and from its size."""
    return lambda path: os.truncate(path, place(header_of(path)[1], path.stat().st_size))


def flip(find: Callable[[Path], int]) -> Damage:
    """One bit of one byte is another."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[find(path)] ^= 1
        path.write_bytes(content)

    return damage


def inside(name: str) -> Callable[[Path], int]:
    """The place of a byte in the middle of a tensor's data."""

    def find(path: Path) -> int:
        header, data = header_of(path)
        begin, end = header[name]["data_offsets"]
        return data + (begin + end) // 2

    return find


def text_at(text: str) -> Callable[[Path], int]:
    """The place of a text's last byte in the header."""
    return lambda path: path.read_bytes().index(text.encode()) + len(text) - 1


def headed(header: bytes) -> bytes:
    """A safetensors file of a header alone."""
    return len(header).to_bytes(8, "little") + header


def instead(content: bytes) -> Damage:
    """The file holds other bytes."""
    return lambda path: path.write_bytes(content)


def moved(stand_in: Callable[[Path, Path], object]) -> Damage:
    """Something else stands under the checkpoint's name, and the checkpoint lies beside it."""

    def damage(path: Path) -> None:
        beside = path.with_name("beside.safetensors")
        os.replace(path, beside)
        stand_in(path, beside)

    return damage


def _socket(path: Path, beside: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(folder)


def of_files(names: list[str]) -> dict[str, Damage]:
    """Damage to the file itself; every refusal names the file."""
    big = (2**62).to_bytes(8, "little")
    return {
        "empty": instead(b""),
        "of 4 bytes": cut(lambda data, size: 4),
        "cut behind the length": cut(lambda data, size: 8),
        "cut in the header": cut(lambda data, size: data // 2),
        "cut behind the header": cut(lambda data, size: data),
        "cut in the data": cut(lambda data, size: (data + size) // 2),
        "cut by a byte": cut(lambda data, size: size - 1),
        "a byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "a header length of 2^62": lambda path: path.write_bytes(big + path.read_bytes()[8:]),
        "a header length of 2^64 - 1": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        "zeros": instead(bytes(4096)),
        "text": instead(b"no checkpoint\n" * 100),
        "a header that is a list": instead(headed(b"[]")),
        "a header of nested lists": instead(headed(b"[" * 100_000)),
        "a header without metadata": instead(headed(b"{}")),
        "metadata null": instead(headed(b'{"__metadata__":null}')),
        "metadata of numbers": instead(headed(b'{"__metadata__":{"kind":5}}')),
        "flipped in the length": flip(lambda path: 0),
        "flipped in the settings": flip(text_at('\\"seed\\": 5')),
        "flipped in the checksum": flip(lambda path: text_at('"checksum":"')(path) + 1),
        "flipped in a tensor's name": flip(text_at("model.")),
        **{f"flipped in {name}": flip(inside(name)) for name in names},
        "a link": moved(lambda path, beside: path.symlink_to(beside)),
        "a link to nowhere": moved(lambda path, beside: path.symlink_to(path.with_name("nowhere"))),
        "a link to a device": moved(lambda path, beside: path.symlink_to("/dev/zero")),
        "a link to itself": moved(lambda path, beside: path.symlink_to(path)),
        "a fifo": moved(lambda path, beside: os.mkfifo(path)),
        "a folder": moved(lambda path, beside: path.mkdir()),
        "a socket": moved(_socket),
    }
