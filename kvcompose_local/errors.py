"""Every error this package raises on purpose.

::

    KVComposeError            one line for the user, exit code 1
    ├── InvalidInput          a value no caller should pass (also a ValueError); exit code 2 on the command line
    ├── ModelError            the GGUF file is missing, damaged or not something we can run
    │   └── TemplateError     its chat template fails, or does not take what was said
    ├── DownloadError         a model or source archive could not be fetched or verified
    ├── BuildError            llama.cpp could not be built
    ├── NoHome                the user has no home folder to keep files in (also an OSError)
    ├── SessionError          a saved chat could not be written, read or verified
    ├── Stopped               Ctrl-C; exit code 130, as of what the signal ends
    └── EngineError           llama.cpp refused or failed; names the call
        ├── ContextFull       the tokens do not fit, and compaction cannot make room
        │   └── PositionsFull there are not as many positions left
        └── StateFormatError  the cache's serialized state is not what this version knows
"""

from __future__ import annotations


class KVComposeError(Exception):
    """Base of all expected failures; ``str(error)`` is one line that says what to do."""

    exit_code = 1


class InvalidInput(KVComposeError, ValueError):
    """An argument is out of its documented range."""

    exit_code = 2


class Stopped(KVComposeError):
    """The user has stopped it."""

    exit_code = 128 + 2  # the number of SIGINT


class ModelError(KVComposeError):
    """The model file cannot be used."""


class TemplateError(ModelError):
    """The chat template fails, or does not take what was said."""


class DownloadError(KVComposeError):
    """A file could not be fetched, or is not the file that was promised."""


class BuildError(KVComposeError):
    """llama.cpp could not be built from source."""


class NoHome(KVComposeError, OSError):
    """This user has no home folder. An OSError, too: where files are a convenience, they are left out."""


class SessionError(KVComposeError):
    """A saved session cannot be written, read or trusted."""


class EngineError(KVComposeError):
    """A llama.cpp call failed."""


class ContextFull(EngineError):
    """There is no room for the tokens, and compaction cannot make any."""


class PositionsFull(ContextFull):
    """The tokens would span more positions than there are, whatever is compressed."""


class StateFormatError(EngineError):
    """The serialized cache differs from the format this code was written for."""
