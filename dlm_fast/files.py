"""Checkpoints as files: where they lie, which files are opened, and what their headers say.

Only safetensors, JSON, chat templates and tokenizer files are ever read or fetched, and never code. What is opened is a
regular file or a link to one, which is what a local cache of the Hub consists of; a name in a file names a file of the
same folder. Everything that is read whole has a largest size, which is compared before anything is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from . import disk
from .limits import shown

CHECKPOINTS = Path(__file__).parent / "tiny" / "checkpoints"
EMBEDDED = ("tiny-full", "tiny-isolated", "tiny-block")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What is fetched of a repository of the Hub besides its weights: configurations, chat templates, tokenizers. Folders in
# it are not.
FETCHED = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken")
# The folder in which transformers looks for further chat templates.
TEMPLATES = "additional_chat_templates"
# The largest size of a tokenizer's file, of another file of text, and of the header of a file of weights; each is far
# above that of any public checkpoint.
MAX_TOKENIZER, MAX_TEXT, MAX_HEADER = 2**27, 2**25, 2**24
# How deep the values of a JSON file may be nested; no public configuration has more than 6 levels.
MAX_DEPTH = 64
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class CheckpointError(ValueError):
    """A folder or file cannot be opened as a checkpoint; the message names the file and the rule."""


def kind_of(path: Path) -> str | None:
    """What a path is, if it is neither a regular file nor a link to one; None if it is. Nothing is opened."""
    try:
        return disk.kind_of(path, follow=True) or (None if os.path.lexists(path) else "no file")
    except OSError:  # a path that is too long, or in a folder that may not be read
        return "no file"


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; a path that is too long for any file system is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; a path that is too long for any file system is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_files(folder: Path) -> None:
    """Raises CheckpointError unless every file that may be read of a folder is a regular file or a link to one.

    To open a fifo waits for who writes it, and a device may never end. Such an entry is refused under every name, since
    the files of tokenizers have many names; a folder, or a link to nothing, is refused under a name that is read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"load: {folder} must be a folder that can be listed, got {error!r}") from error
    for entry in entries:
        kind = kind_of(entry)
        may_be = kind in (None, "no file")
        if kind in ("a folder", "a link to nothing"):
            may_be = not any(entry.match(pattern) for pattern in (*FETCHED, "*.safetensors"))
        if not may_be:
            raise CheckpointError(f"load: {entry.name} of {folder} must be a regular file, got {kind}")
    if (folder / TEMPLATES).is_dir():
        check_files(folder / TEMPLATES)


def read_bytes(path: Path, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError for anything else."""
    with os.fdopen(disk.open_regular(path, os.O_RDONLY, follow=True), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"must have at most {limit} bytes, got {size}")
        return file.read(limit)


def checkpoint_path(name_or_path: str | Path, revision: str | None = None, *, argument: str = "path") -> Path:
    """The folder of an embedded model (`EMBEDDED`), of a checkpoint on disk, or of a repository of the Hub.

    A repository is taken from the local cache as it lies there; only what the cache does not have is fetched.

    Args:
        name_or_path: an embedded model's name, a folder, or an id such as "GSAI-ML/LLaDA-8B-Instruct".
        revision: branch, tag or commit of the repository; None = main. A folder has none.
        argument: name of the argument, for errors.
    Raises:
        CheckpointError: there is neither such a folder nor such a repository, or it has no safetensors.
    """
    if not isinstance(name_or_path, (str, Path)) or name_or_path == "":
        raise TypeError(f"load: {argument} must be a folder or an id of the Hub, got {argument}={shown(name_or_path)}")
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"load: revision must be a branch, tag or commit, or None, got revision={shown(revision)}")
    path = Path(name_or_path)
    if str(name_or_path) in EMBEDDED and not path.exists():
        path = CHECKPOINTS / str(name_or_path)
    if is_folder(path):
        if revision is not None:
            raise CheckpointError(f"load: revision is for repositories of the Hub, got {revision!r} with {str(path)!r}")
        check_files(path)
        return path
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path) and not os.path.lexists(path):
        path = _snapshot(name_or_path, revision, argument)
        check_files(path)
        return path
    raise CheckpointError(
        f"load: {argument} must be a checkpoint folder, an id of the Hub (owner/name) or one of "
        f"{', '.join(EMBEDDED)}, got {str(name_or_path)!r}"
    )


def _snapshot(repository: str, revision: str | None, argument: str) -> Path:
    """The folder of a repository's snapshot in the local cache, fetched where the cache does not have it whole."""
    path = _cached(repository, revision)
    if path is not None and _whole(path) and _has_tokenizer(path):
        return path
    try:
        with _asking_the_hub(repository, revision, argument, path):
            folder = _fetch(repository, revision)
            if (folder / "model.safetensors.index.json").is_file():
                return _fetch(repository, revision, *(file.name for file in weight_files(folder)))
            return _fetch(repository, revision, "model.safetensors", ADAPTER_WEIGHTS)
    except CheckpointError as error:
        if path is None or not _whole(path):
            raise
        warnings.warn(f"load: the local cache of {repository} has no tokenizer ({error})", stacklevel=4)
        return path


def _fetch(repository: str, revision: str | None, *names: str, **options: bool) -> Path:
    """Fetches what stands beside the weights of a repository, and the files `names`; the folder of the snapshot."""
    import huggingface_hub

    wanted = {"allow_patterns": [*FETCHED, *names], "ignore_patterns": ["*/*"], **options}
    return Path(huggingface_hub.snapshot_download(repository, revision=revision, **wanted))


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository's snapshot in the local cache, whole or not; None where there is none."""
    try:
        return _fetch(repository, revision, local_files_only=True)
    except Exception:  # it is not in the cache, so that the Hub is asked
        return None


@contextlib.contextmanager
def _asking_the_hub(repository: str, revision: str | None, argument: str, cached: Path | None) -> Iterator[None]:
    """Checks that a repository has weights to fetch, and gives an error of the Hub the name of the repository."""
    import huggingface_hub

    named = repository if revision is None else f"{repository} at revision {revision}"
    try:
        names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
        if not any(name.endswith(".safetensors") for name in names):
            pickles = [name for name in names if Path(name).suffix in PICKLES]
            hint = f"; it has {', '.join(pickles[:4])}, and pickle checkpoints are never opened" if pickles else ""
            raise CheckpointError(f"load: {named} has no *.safetensors weights{hint}")
        yield
    except CheckpointError:
        raise
    except Exception as error:
        state = "is no folder and not in the local cache" if cached is None else "is not whole in the local cache"
        raise CheckpointError(
            f"load: {argument}={named!r} {state}, and the Hub cannot be asked for it: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error


@contextlib.contextmanager
def described(name_or_path: str | Path, revision: str | None = None) -> Iterator[tuple[str | Path, str | None]]:
    """What to open, and at which revision, for those who read no weights: nothing but headers is fetched of a
    repository's weights. The arguments are those of `checkpoint_path`.

    What the cache does not hold whole stands in a temporary folder of the repository's name, in which a file of weights
    is its header, and behind the header a hole of the size of the weights.
    """
    of_the_hub = isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path) is not None
    if not of_the_hub or os.path.lexists(name_or_path):
        yield name_or_path, revision
        return
    path = _cached(name_or_path, revision)
    if path is not None and _whole(path):
        yield name_or_path, revision
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name_of(name_or_path)
        with _asking_the_hub(name_or_path, revision, "path", path):
            _fetch_headers(name_or_path, revision, folder)
        yield folder, None


def _fetch_headers(repository: str, revision: str | None, folder: Path) -> None:
    """Writes a repository's files into a folder, those of its weights as headers over holes."""
    import huggingface_hub

    shutil.copytree(_fetch(repository, revision), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if not (folder / "config.json").is_file():
        return  # an adapter, or no model at all, as who reads the folder says
    index = folder / "model.safetensors.index.json"
    for file in weight_files(folder) if index.is_file() else [folder / "model.safetensors"]:
        header = huggingface_hub.HfApi().parse_safetensors_file_metadata(repository, file.name, revision=revision)
        tensors = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in header.tensors.items()
        }
        text = json.dumps(tensors).encode()
        with file.open("wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            size = max((info["data_offsets"][1] for info in tensors.values()), default=0)
            written.truncate(8 + len(text) + size)


def _whole(path: Path) -> bool:
    """Whether a snapshot has its configuration and all of its weights."""
    if (path / ADAPTER_CONFIG).is_file() and (path / ADAPTER_WEIGHTS).is_file():
        return True
    try:
        return (path / "config.json").is_file() and all(file.is_file() for file in weight_files(path))
    except CheckpointError:
        return False


def _has_tokenizer(path: Path) -> bool:
    """Whether a snapshot has the files of a tokenizer; an adapter needs none."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    return not (path / "config.json").is_file() or any((path / name).is_file() for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file that holds an object, at most `MAX_DEPTH` levels deep."""
    try:
        values = json.loads(read_bytes(path).decode("utf-8"))
        check_depth(values)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"load: {path} is not readable JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"load: {path} must hold a JSON object, got a {type(values).__name__}")
    return values


def check_depth(values: Any) -> None:
    """Raises ValueError for values of a JSON file that are nested deeper than what reads them can recurse."""
    level, depth = [values], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"values must be nested at most {MAX_DEPTH} levels deep, got more")
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        depth += 1


def read_config(path: Path) -> dict[str, Any]:
    """The values of the folder's config.json."""
    if not (path / "config.json").is_file():
        if (path / ADAPTER_CONFIG).is_file():
            base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise CheckpointError(
                f"load: {path} is an adapter of {base!r} and no model; open the model with it, "
                f"load({base or 'MODEL'!r}, adapter={str(path)!r})"
            )
        raise CheckpointError(f"load: {path} has no config.json")
    return read_json(path / "config.json")


def weight_files(path: Path) -> list[Path]:
    """The folder's weight files: model.safetensors, or the shards that model.safetensors.index.json lists.

    A shard must lie in the folder itself.
    """
    single_file, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        names = list(named.values()) if isinstance(named, dict) else []
        wrong = [name for name in names if not is_plain(name)]
        if not names or wrong:
            got = f"weight_map={named!r}" if not names else f"the name {wrong[0]!r}"
            raise CheckpointError(
                f"load: {index} is not a safetensors index: weight_map must name files of this folder, got {got[:200]}"
            )
        return [path / name for name in sorted(set(names))]
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


def is_path(value: Any) -> bool:
    """Whether a value is a text that can name a file."""
    return isinstance(value, str) and value != "" and value.encode(errors="ignore").decode() == value


def is_plain(name: Any) -> bool:
    """Whether a value of a file is the name of an entry of the file's own folder, and no path that leads elsewhere."""
    return is_path(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def check_one_set(path: Path) -> None:
    """Raises CheckpointError for a folder with model.safetensors beside shards that its index lists."""
    if (path / "model.safetensors").is_file() and path / "model.safetensors" not in weight_files(path):
        raise CheckpointError(
            f"load: {path} has both model.safetensors and a model.safetensors.index.json of other files; keep one of "
            "the two"
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, as the file's header describes it.

    Attributes:
        file: the file.
        dtype: name of the dtype in the header.
        shape: the shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """The tensors of safetensors files, by name, from the headers alone.

    Raises CheckpointError unless all files are intact and no two of them hold the same tensor.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            _check_header(file)
            # Opening checks the header, and checks that the file is exactly as long as the header says.
            with safe_open(file, framework="pt") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}
                found = {name: Stored(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, OSError, RuntimeError) as error:  # a RuntimeError where memory cannot map the file
            raise CheckpointError(f"load: {file} is not a readable safetensors file, got {error}") from error
        duplicates = sorted(found.keys() & tensors.keys())
        if duplicates:
            raise CheckpointError(
                f"load: {file} holds tensors that another file of {file.parent} holds too: {duplicates[:8]}"
            )
        tensors |= found
    return tensors


def _check_header(file: Path) -> None:
    """Raises OSError unless a file of weights is a regular file whose header has at most `MAX_HEADER` bytes."""
    kind = kind_of(file)
    if kind is not None:
        raise OSError(kind)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER:
        raise OSError(f"a header of {length} bytes, of which there may be {MAX_HEADER}")


def stored_dtypes(files: list[Path]) -> dict[str, str]:
    """The dtype of every tensor in safetensors files, by the name in the file's header (see `stored_tensors`)."""
    return {name: stored.dtype for name, stored in stored_tensors(files).items()}


def name_of(path: str | Path) -> str:
    """The name of a checkpoint: the last part of its path or id, or the repository's of a snapshot in a local cache."""
    folder = Path(path)
    if folder.is_dir():
        whole = folder.resolve()
        cached = next((part for part in reversed(whole.parts) if part.startswith("models--")), None)
        if cached is not None and "snapshots" in whole.parts:
            return cached.rpartition("--")[2]
        return folder.name if folder.name not in ("", "..") else whole.name
    return folder.name


def generation_values(path: Path) -> Mapping[str, Any]:
    """The values of the folder's generation_config.json; empty where it has none."""
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}
