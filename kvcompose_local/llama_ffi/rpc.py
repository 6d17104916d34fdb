"""llama.cpp's distributed backend: layers, and their cells, on workers of other machines (ggml-rpc.h)."""

from __future__ import annotations

import ctypes
import signal
import socket
from collections.abc import Sequence

from kvcompose_local.errors import EngineError, InvalidInput
from kvcompose_local.llama_ffi.library import bind

_DEVICE_TYPE_CPU = 0
_CONNECT_SECONDS = 5.0

_add_server = bind("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
_register = bind("ggml_backend_register", None, ctypes.c_void_p)
_start_server = bind(
    "ggml_backend_rpc_start_server",
    None,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
_device_count = bind("ggml_backend_dev_count", ctypes.c_size_t)
_device_get = bind("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_device_type = bind("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """(host, port) of ``HOST:PORT``. Raises InvalidInput for anything else."""
    host, colon, port = endpoint.strip().rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise InvalidInput(f"{endpoint!r} is not HOST:PORT")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    return host == "localhost" or host.startswith("127.")


def add_workers(endpoints: Sequence[str]) -> None:
    """Make the devices of running workers known to llama.cpp; models loaded afterwards may use them.

    Raises EngineError, in one line, for a worker that does not answer, before llama.cpp tries (which would abort).
    """
    if _add_server is None:
        raise EngineError("this llama.cpp has no RPC backend: `kvcompose-local build` makes one that has")
    for endpoint in endpoints:
        host, port = parse_endpoint(endpoint)
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host is like that
            reason = getattr(error, "strerror", None) or "no such host"
            raise EngineError(
                f"no RPC worker answers at {endpoint} ({reason}): "
                f"start one there with `kvcompose-local rpc-server --port {port}`"
            ) from error
        registry = _add_server(f"{host}:{port}".encode())
        if not registry:
            raise EngineError(f"{endpoint} does not speak this version of ggml's RPC protocol")
        _register(registry)


def serve(host: str, port: int, n_threads: int) -> None:
    """Be a worker until Ctrl-C. Raises EngineError when the address cannot be listened on."""
    if _start_server is None:
        raise EngineError("this llama.cpp has no RPC backend: `kvcompose-local build` makes one that has")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    devices = [_device_get(i) for i in range(_device_count())]
    offloading = [d for d in devices if _device_type(d) != _DEVICE_TYPE_CPU]
    chosen = offloading or devices
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the server never comes back to Python
    _start_server(f"{host}:{port}".encode(), None, n_threads, len(chosen), (ctypes.c_void_p * len(chosen))(*chosen))
    raise EngineError(f"the RPC server on {host}:{port} ended")
