"""Profiles of models: the scorer that predicts from cells what questions will look at, measured once a model.

A *profile* belongs to the sha256 of the GGUF file. It is a safetensors file: tensors ``weights.l`` (F16) and
``places.l`` (F32) of each layer, and as metadata what it was fitted to and what cache types cost. Some come with the
program, beside this module. The ones that a user measures (``kvcompose-local profile``) stand in the cache folder and
count first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import InvalidInput, NoHome
from kvcompose_local.install.model_files import model_digest, size_of
from kvcompose_local.install.resources import cache_folder

FORMAT = 2
SUFFIX = ".safetensors"
_TEXT, _NUMBERS = ("model", "model_sha256", "kinds"), ("model_bytes", "n_texts", "n_tokens", "furthest")


@dataclass(frozen=True)
class Profile:
    """A scorer, and the model and texts that it was fitted to.

    model: name, for people; model_sha256, model_bytes: of the GGUF file; n_texts, n_tokens: texts, and tokens of all of
    them; kinds: of text, comma-separated; kl: what cache types cost, in nats a token from F16, where it was measured.
    """

    model: str
    model_sha256: str
    model_bytes: int
    n_texts: int
    n_tokens: int
    kinds: str
    scorer: Scorer
    kl: Mapping[str, float] = field(default_factory=dict)

    def dump(self) -> bytes:
        """As a file's bytes."""
        from safetensors.numpy import save  # late: what reads a profile does not need it

        layers = range(len(self.scorer.weights))
        tensors: dict[str, npt.NDArray[Any]] = {f"weights.{i}": self.scorer.weights[i] for i in layers}
        tensors |= {f"places.{i}": self.scorer.places[i] for i in layers}
        facts = {name: str(getattr(self, name)) for name in (*_TEXT, *_NUMBERS[:-1])}
        facts |= {"format": str(FORMAT), "furthest": str(self.scorer.furthest), "kl": json.dumps(dict(self.kl))}
        return save(tensors, facts)


def read(path: Path) -> Profile:
    """Read a profile. Raises InvalidInput for a file that is none."""
    try:
        with safe_open(path, "numpy") as file:
            facts = _facts_of(file.metadata())
            kl = {str(name): float(cost) for name, cost in json.loads(file.metadata().get("kl", "{}")).items()}
            n_layers = len(file.keys()) // 2
            weights, places = (
                tuple(file.get_tensor(f"{kind}.{i}") for i in range(n_layers)) for kind in ("weights", "places")
            )
            scorer = Scorer(weights, places, int(facts.pop("furthest")))
            return Profile(**facts, scorer=scorer, kl=kl)  # type: ignore[arg-type]
    except (SafetensorError, InvalidInput, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path} is no profile of this version ({str(error)[:80]}): `kvcompose-local profile` measures one"
        ) from error


def _facts_of(metadata: dict[str, str] | None) -> dict[str, str | int]:
    """The facts in a file beside its tensors. Raises ValueError, or KeyError, for a file of another format."""
    metadata = metadata or {}
    if metadata.get("format") != str(FORMAT):
        raise ValueError("it has another format")
    return {**{name: metadata[name] for name in _TEXT}, **{name: int(metadata[name]) for name in _NUMBERS}}


def user_path(model_sha256: str) -> Path:
    """The file for the profile that a user measures. Raises NoHome."""
    return cache_folder() / "profiles" / f"{model_sha256}{SUFFIX}"


def find(n_bytes: int, digest: Callable[[], str]) -> Profile | None:
    """The profile of a model file of ``n_bytes``, the user's own first; None where it has no profile.

    digest: gives the file's sha256, asked only where some profile is of a file as large, since it may take seconds.
    """
    return _among(_files(), n_bytes, digest)


def shipped(n_bytes: int, model_sha256: str) -> Profile | None:
    """The profile of a model file that comes with the program, whether or not the user has an own one."""
    return _among(_shipped_files(), n_bytes, lambda: model_sha256)


def _among(files: Iterable[Path], n_bytes: int, digest: Callable[[], str]) -> Profile | None:
    candidates = [path for path in files if _n_bytes_of(path) == n_bytes]
    model_sha256 = digest() if candidates else ""
    for path in candidates:
        with suppress(InvalidInput):
            profile = read(path)
            if profile.model_sha256 == model_sha256:
                return profile
    return None


def of_file(path: Path) -> Profile | None:
    """The profile of a GGUF file, as :func:`find`. Raises what :func:`model_digest` raises."""
    return find(size_of(path), lambda: model_digest(path))


def _files() -> Iterator[Path]:
    with suppress(NoHome, OSError):
        yield from sorted((cache_folder() / "profiles").glob(f"*{SUFFIX}"))
    yield from _shipped_files()


def _shipped_files() -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"*{SUFFIX}"))


def _n_bytes_of(path: Path) -> int | None:
    """Bytes of the model that a profile belongs to; None for a file that cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            return int(_facts_of(file.metadata())["model_bytes"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
