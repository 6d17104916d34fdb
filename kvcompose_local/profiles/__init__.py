"""What was measured once a model: what its layers' cells are worth, and layer budgets that need no replay.

Which layers need many tokens is nearly the same for every text. A *profile* holds the share of the tokens that each
layer keeps at some keep ratios and what predicts what questions look at (:mod:`predictor`), as ``kvcompose-local
profile`` measured them, and the weights by which layers' scores compete; it is keyed by the sha256 of the GGUF file.
The ones beside this module come with the program, those that a user measures stand in the cache folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.errors import InvalidInput, KVComposeError, NoHome
from kvcompose_local.install.model_files import size_of
from kvcompose_local.interfaces import IntArray
from kvcompose_local.predictor import Predictor
from kvcompose_local.resources import cache_folder

FORMAT = 1
#: Keep ratios that are measured.
KEEPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
#: Fields that are written a line a row.
_TABLES = ("shares", "predictor")
#: Of a keep ratio: less than one token of any cache.
_PRECISION = 2.0**-40


@dataclass(frozen=True)
class Profile:
    """The shares of its tokens that each layer keeps.

    model: name, for people; model_sha256: of the GGUF; keeps: R rising ratios, the last one 1; shares: R lists of L
    shares in [0, 1], none of which falls from one ratio to the next; n_texts, n_tokens: texts measured, and the length
    of each; weights: L factors of scores where layers compete for few cells (:func:`faded`), 0.5 for a layer whose
    cells are worth half of what attention says, none where they were not tuned; model_bytes: of the GGUF; predictor:
    the weights of a :class:`~kvcompose_local.predictor.Predictor`, none where it was not fitted.
    """

    model: str
    model_sha256: str
    keeps: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    n_texts: int
    n_tokens: int
    weights: tuple[float, ...] = ()
    model_bytes: int = 0
    predictor: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Profile:
        """From JSON. Raises InvalidInput for anything that is no profile."""
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("it has another format")
            values["keeps"] = tuple(map(float, values["keeps"]))
            values["shares"] = tuple(tuple(map(float, row)) for row in values["shares"])
            values["weights"] = tuple(map(float, values.get("weights", ())))
            values["predictor"] = tuple(tuple(map(float, row)) for row in values.get("predictor", ()))
            profile = cls(**values)
            keeps, shares = np.array(profile.keeps), np.array(profile.shares)
            if shares.ndim != 2 or keeps.shape != shares.shape[:1] or not keeps.size or not shares.size:
                raise ValueError("its shapes do not fit")
            if not ((np.diff(keeps, prepend=0.0) > 0).all() and keeps[-1] == 1 and (shares[-1] == 1).all()):
                raise ValueError("its keep ratios do not rise to 1")
            if not ((np.diff(shares, axis=0, prepend=np.zeros((1, shares.shape[1]))) >= 0).all()):
                raise ValueError("its shares fall")
            weights = np.array(profile.weights)
            if weights.size and (weights.shape != shares.shape[1:] or not (np.isfinite(weights) & (weights > 0)).all()):
                raise ValueError("its weights do not fit")
            if profile.predictor:
                Predictor(profile.predictor)
            if not (isinstance(profile.model, str) and isinstance(profile.model_sha256, str)):
                raise ValueError("it names no model")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidInput(
                f"this is no layer profile ({error}): measure one with `kvcompose-local profile`"
            ) from error
        return profile

    def dump(self) -> str:
        """As JSON, a line a keep ratio, and a head of the predictor."""
        values = {"format": FORMAT, **asdict(self)}
        text = json.dumps({name: value for name, value in values.items() if name not in _TABLES}, indent=1)[:-2]
        for name in _TABLES:
            rows = ",\n  ".join(json.dumps(row) for row in values[name])
            text += f',\n "{name}": [\n  {rows}\n ]' if rows else ""
        return text + "\n}\n"

    def budgets(
        self,
        n_tokens: int,
        available: Sequence[int] | IntArray,
        row_bytes: Sequence[int] | IntArray,
        byte_budgets: Sequence[int],
        device: Sequence[int] | IntArray,
        *,
        min_per_layer: int = 0,
    ) -> IntArray:
        """Composite tokens to keep in each layer: int64 (L,).

        n_tokens: that were seen, which the shares are of; available: rows that each layer has, int (L,), which bound
        what it can keep; row_bytes: int (L,), 0 for a layer that gets nothing; byte_budgets: one a device; device: int
        (L,). Each device takes the largest keep ratio that its bytes hold; ``min_per_layer`` rows of every layer are
        taken whatever the shares say. Raises InvalidInput for a profile of another number of layers.
        """
        rows, cost, drawn_on = (np.asarray(x, np.int64) for x in (available, row_bytes, device))
        if rows.shape != (len(self.shares[0]),):
            raise InvalidInput(f"the profile has {len(self.shares[0])} layers, and the model composes {rows.size}")
        least = np.where(cost > 0, np.minimum(rows, min_per_layer), 0)

        def at(keep: float) -> IntArray:
            wanted = np.floor(self._shares_at(keep) * n_tokens).astype(np.int64)
            return np.where(cost > 0, np.clip(wanted, least, rows), 0)

        budgets = least
        for index, limit in enumerate(byte_budgets):
            here = drawn_on == index

            def fits(keep: float, here: NDArray[np.bool_] = here, limit: int = limit) -> bool:
                return int((at(keep) * cost)[here].sum()) <= limit

            low, high = (1.0, 1.0) if fits(1.0) else (0.0, 1.0)
            while high - low > _PRECISION:
                middle = (low + high) / 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            budgets = np.where(here, at(low), budgets)
        return budgets

    def _shares_at(self, keep: float) -> NDArray[np.float64]:
        """float64 (L,) by straight lines between what was measured, from nothing at 0."""
        keeps = np.concatenate([[0.0], self.keeps])
        shares = np.vstack([np.zeros(len(self.shares[0])), self.shares])
        return np.array([np.interp(keep, keeps, column) for column in shares.T])


class Tuning(NamedTuple):
    """What a profile knows beside its shares: ``weights`` and ``predictor`` of it, each as far as there is one."""

    weights: tuple[float, ...] = ()
    predictor: Predictor | None = None


NOT_TUNED = Tuning()


def average(
    model: str,
    model_sha256: str,
    budgets: Sequence[NDArray[np.int64]],
    n_tokens: Sequence[int],
    weights: Sequence[float] = (),
    model_bytes: int = 0,
    predictor: Sequence[Sequence[float]] = (),
) -> Profile:
    """The profile of some texts: of each the budgets int (R, L) at :data:`KEEPS`, and its tokens."""
    shares = np.mean([b / n for b, n in zip(budgets, n_tokens, strict=True)], axis=0)
    shares[-1] = 1.0
    rising = np.maximum.accumulate(np.floor(shares * 1e4) / 1e4, axis=0)
    return Profile(
        model,
        model_sha256,
        KEEPS,
        tuple(map(tuple, rising.tolist())),
        len(budgets),
        int(np.mean(n_tokens)),
        tuple(weights),
        model_bytes,
        tuple(map(tuple, predictor)),
    )


def user_path(model_sha256: str) -> Path:
    """Where the profile that a user measures belongs. Raises NoHome."""
    return cache_folder() / "profiles" / f"{model_sha256}.json"


def find(model_sha256: str) -> Profile:
    """The profile of a model: the user's own, or one that came with the program.

    Raises KVComposeError where there is none, and InvalidInput where the user's is damaged.
    """
    own = None
    with suppress(NoHome):
        own = user_path(model_sha256)
    if own and own.exists():
        try:
            return Profile.parse(own.read_text(encoding="utf-8", errors="replace"))
        except (InvalidInput, OSError) as error:
            raise InvalidInput(f"{own}: {error}") from error
    for profile in _shipped():
        if profile.model_sha256 == model_sha256:
            return profile
    raise KVComposeError("this model has no layer profile yet: `kvcompose-local profile MODEL` measures one")


def faded(weights: Sequence[float], keep: float) -> list[float]:
    """Weights for a cache of this share of the tokens seen: those of a profile are for the smallest.

    A layer that attention leaves with too few cells has enough where there are many, so that a weight's exponent falls
    from 1 to 0 at a half (docs/trials.md).
    """
    exponent = max(0.0, 1 - 2 * keep)
    return [float(weight**exponent) for weight in weights]


def tuning_of(path: Path, digest: Callable[[Path], str]) -> Tuning:
    """How to choose in the model of a file, the user's own profile first, as far as it was tuned.

    digest: gives a file's sha256, asked only where some tuned profile is of a file as large, since it may take seconds.
    """
    n_bytes = size_of(path)
    tuned = [p for p in (*_own(), *_shipped()) if (p.weights or p.predictor) and p.model_bytes == n_bytes]
    model_sha256 = digest(path) if tuned else ""
    known = [profile for profile in tuned if profile.model_sha256 == model_sha256]
    predictor = next((profile.predictor for profile in known if profile.predictor), ())
    weights = next((profile.weights for profile in known if profile.weights), ())
    return Tuning(weights, Predictor(predictor) if predictor else None)


def _shipped() -> Iterator[Profile]:
    for path in sorted(Path(__file__).parent.glob("*.json")):
        yield Profile.parse(path.read_text(encoding="utf-8"))


def _own() -> Iterator[Profile]:
    """Those in the cache folder that can be read."""
    own: list[Path] = []
    with suppress(OSError):  # as where there is no home folder
        own = sorted((cache_folder() / "profiles").glob("*.json"))
    for path in own:
        with suppress(InvalidInput, OSError):
            yield Profile.parse(path.read_text(encoding="utf-8", errors="replace"))
