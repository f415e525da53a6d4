"""A network that nobody may ask: every function that opens a connection, looks up a name or fetches a file of the Hub
raises an error."""

from __future__ import annotations

import contextlib
import importlib
import socket
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

SOCKETS = ("socket", "create_connection", "getaddrinfo", "gethostbyname", "gethostbyaddr", "socketpair")
# Functions that send or fetch, by the module that has them; of packages that are not installed there is none.
SENDING = {
    "urllib.request": ("urlopen", "urlretrieve", "OpenerDirector.open"),
    "httpx": ("Client.send", "AsyncClient.send", "HTTPTransport.handle_request"),
    "httpx2": ("Client.send", "AsyncClient.send", "HTTPTransport.handle_request"),
    "requests": ("Session.send",),
    "urllib3": ("PoolManager.urlopen", "HTTPConnectionPool.urlopen"),
    "huggingface_hub": ("hf_hub_download", "snapshot_download", "HfApi.model_info", "HfApi.list_repo_files"),
    "huggingface_hub.file_download": ("hf_hub_download", "http_get", "get_hf_file_metadata"),
    "kernels": ("get_kernel",),
    "transformers.integrations.hub_kernels": ("get_kernel", "lazy_load_kernel"),
    "transformers.dynamic_module_utils": ("get_class_from_dynamic_module", "get_cached_module_file"),
}


class NetworkAsked(AssertionError):
    """Somebody asked the network, or for code of the Hub."""


def _refuse(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(name)
        raise NetworkAsked(f"{name} was asked: {str(args)[:200]}")

    return refuse


# What was asked since `refused` was entered, also where somebody caught the error.
asked: list[str] = []


@contextlib.contextmanager
def refused() -> Iterator[list[str]]:
    """Whatever asks the network fails, and is noted in the list that is given."""
    asked.clear()
    with contextlib.ExitStack() as stack:
        for name in SOCKETS:
            stack.enter_context(mock.patch.object(socket, name, _refuse(f"socket.{name}")))
        for module, names in SENDING.items():
            try:
                owner = importlib.import_module(module)
            except ImportError:
                continue
            for name in names:
                path, _, leaf = name.rpartition(".")
                target = getattr(owner, path, None) if path else owner
                if hasattr(target, leaf):
                    stack.enter_context(mock.patch.object(target, leaf, _refuse(f"{module}.{name}")))
        # Modules that took the functions by their names.
        for name, module in list(sys.modules.items()):
            for leaf in ("get_kernel", "lazy_load_kernel", "hf_hub_download", "snapshot_download", "http_get"):
                if name.startswith("transformers") and leaf in vars(module):
                    stack.enter_context(mock.patch.object(module, leaf, _refuse(f"{name}.{leaf}")))
        yield asked
