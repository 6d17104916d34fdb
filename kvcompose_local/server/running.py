"""The server as a process: it ends in order, within a second."""

from __future__ import annotations

import gc
import logging
import socket
import sys
import traceback
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from kvcompose_local.server.service import Service

#: Connections at a time; more get 503 from uvicorn.
_CONNECTIONS = 256
#: Seconds that the engine's thread may go on in Python while a request waits for the interpreter. A request takes some
#: ten turns; with Python's own 5 ms it took 40 where a long text was tokenized meanwhile.
_SWITCH_SECONDS = 0.0005


def run(app: ASGIApp, service: Service, listener: socket.socket) -> None:
    """Serve until a signal says to end. Raises KVComposeError where the first model cannot be loaded."""

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.worker.stop()  # what is said by now is kept
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=30,
            limit_concurrency=_CONNECTIONS,
        )
    )

    def on_failure(_error: BaseException) -> None:
        server.should_exit = True

    service.on_failure = on_failure
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()  # a full collection that looks at all that was imported holds the interpreter for 50 ms
    for name in ("kvcompose_local.server", "uvicorn.error"):
        without_texts(logging.getLogger(name))
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def without_texts(log: logging.Logger) -> None:
    """Have a logger tell where something went wrong, and not the message: that may hold what a user said."""
    log.addFilter(_where)


def _where(record: logging.LogRecord) -> bool:
    if record.exc_info and (error := record.exc_info[1]) is not None:
        places = "".join(traceback.format_tb(error.__traceback__))
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}\n{places}".rstrip(), ()
        record.exc_info = record.exc_text = None
    return True
