"""Loading a model while something else is done."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from kvcompose_local.errors import EngineError
from kvcompose_local.llama_ffi.model import Model

#: Seconds that a thread may keep Python's lock. Read once: of two loadings neither may restore the other's.
_USUAL_SWITCH, _SHORT_SWITCH = sys.getswitchinterval(), 1e-4


class Loading:
    """A model that a thread of its own loads, so that its user can get ready meanwhile.

    Call it once, like :class:`Model`, to take the model. If nobody takes it, close it, which stops the loading.
    """

    def __init__(self, path: Path, *, gpu_layers: int = 0) -> None:
        self._wanted = (path, gpu_layers)
        self._model: Model | None = None
        self._error: BaseException | None = None
        self._percent = 0
        self._closed = False
        # llama.cpp logs some thousand lines meanwhile, and each waits for whoever runs Python.
        sys.setswitchinterval(_SHORT_SWITCH)
        self._thread = threading.Thread(target=self._load, daemon=True)
        self._thread.start()

    @property
    def gpu_layers(self) -> int:
        """The layers on the GPU that it was begun with."""
        return self._wanted[1]

    def _load(self) -> None:
        path, gpu_layers = self._wanted
        try:
            self._model = Model(path, gpu_layers=gpu_layers, progress=self._on_progress)
        except BaseException as error:
            self._error = error
        finally:
            sys.setswitchinterval(_USUAL_SWITCH)

    def _on_progress(self, percent: int, _total: int) -> None:
        self._percent = percent
        if self._closed:
            raise KeyboardInterrupt

    def __call__(self, path: Path, *, gpu_layers: int = 0, progress: Callable[[int, int], None] | None = None) -> Model:
        """The model, which belongs to the caller from now on; raises what Model and ``progress`` raise."""
        if self._wanted != (path, gpu_layers):
            self.close()
            return Model(path, gpu_layers=gpu_layers, progress=progress)
        while self._thread.is_alive():
            self._thread.join(0.05)
            if progress is not None:
                progress(self._percent, 100)
        if self._error is not None:
            raise self._error
        model, self._model = self._model, None
        if model is None:
            raise EngineError("this model was closed or is in use already")
        return model

    def close(self) -> None:
        """Stop loading, or free the model if nobody has taken it."""
        self._closed = True
        self._thread.join()
        if self._model is not None:
            self._model.close()
            self._model = None
