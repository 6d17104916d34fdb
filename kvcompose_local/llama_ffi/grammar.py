"""Answers of a given form: llama.cpp's grammar sampler, and llama-cpp-python's converter of JSON schemas."""

from __future__ import annotations

import codecs
import ctypes
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompose_local.errors import EngineError, InvalidInput
from kvcompose_local.interfaces import FloatArray
from kvcompose_local.llama_ffi.library import clear_log, last_log, lib, without_high_level

if TYPE_CHECKING:
    from kvcompose_local.llama_ffi.model import Model

#: ``llama_token_data``: id, logit, p.
_TOKEN_DATA = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
#: Which second bytes may follow a first one in UTF-8, where that is not any continuation.
_SECOND_BYTES = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


class Grammar:
    """A grammar in llama.cpp's notation (GBNF), which follows what is drawn: text of it, in UTF-8 that is valid.

    markers: texts of control tokens that it may hold; no others are text, whatever they are written as. Raises
    InvalidInput where llama.cpp cannot read it.
    """

    def __init__(self, model: Model, gbnf: str, markers: frozenset[str] = frozenset()) -> None:
        self._model = model
        allowed = {t for t in model.control_tokens if model.control_text(t) in markers} if markers else set()
        self._refused = np.array(sorted(set(model.control_tokens) - allowed), np.int64)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        clear_log()
        self._pointer = lib.llama_sampler_init_grammar(model._vocab, gbnf.encode(), b"root")
        if not self._pointer:
            raise InvalidInput(f"llama.cpp cannot read this grammar{last_log()}")

    def close(self) -> None:
        """Free it; further use is an error."""
        if self._pointer:
            lib.llama_sampler_free(self._pointer)
            self._pointer = None

    def sample(self, chain: Any, logits: FloatArray) -> int:
        """Draw a token that the grammar allows by a chain of samplers, which then knows it; float32 (n_vocab,).

        What the chain draws is looked at first: to ask the grammar about a whole vocabulary takes milliseconds.
        """
        token = _drawn(chain, _candidates(logits))
        if not self._allows(token):
            candidates = _candidates(logits)
            array = _array_of(candidates)
            lib.llama_sampler_apply(self._pointer, ctypes.byref(array))
            candidates["logit"][self._refused] = -np.inf
            token = _drawn(chain, candidates.copy())
            while not self._is_text(token):  # llama.cpp takes any byte for a character
                candidates["logit"][token] = -np.inf
                if not np.isfinite(candidates["logit"]).any():
                    raise EngineError("the grammar allows no token that goes on with this text")
                token = _drawn(chain, candidates.copy())
        lib.llama_sampler_accept(chain, token)
        lib.llama_sampler_accept(self._pointer, token)
        self._decoder.decode(self._model.token_bytes(token))
        return token

    def _is_text(self, token: int) -> bool:
        """Whether what was drawn goes on with this token as valid UTF-8."""
        before = self._decoder.getstate()
        try:
            self._decoder.decode(self._model.token_bytes(token))
            begun = self._decoder.getstate()[0]
        except UnicodeDecodeError:
            return False
        finally:
            self._decoder.setstate(before)
        # Python looks at the second byte of three only when it has the third.
        low, high = _SECOND_BYTES.get(begun[0], (0x80, 0xBF)) if len(begun) > 1 else (0, 0)
        return len(begun) < 2 or low <= begun[1] <= high

    def _allows(self, token: int) -> bool:
        if (self._refused == token).any() or not self._is_text(token):
            return False
        one = np.zeros(1, _TOKEN_DATA)
        one["id"] = token
        array = _array_of(one)
        lib.llama_sampler_apply(self._pointer, ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))


def _candidates(logits: FloatArray) -> Any:
    found = np.empty(len(logits), _TOKEN_DATA)
    found["id"], found["logit"], found["p"] = np.arange(len(logits)), logits, 0
    return found


def _array_of(candidates: Any) -> Any:
    pointer = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
    return lib.llama_token_data_array(pointer, len(candidates), -1, False)


def _drawn(chain: Any, candidates: Any) -> int:
    array = _array_of(candidates)
    lib.llama_sampler_apply(chain, ctypes.byref(array))
    return int(array.data[array.selected].id)


def gbnf_of_schema(schema: Any) -> str:
    """The grammar of all texts that a JSON schema allows. Raises InvalidInput where the converter does not know it."""
    with without_high_level():
        from llama_cpp.llama_grammar import json_schema_to_gbnf
    try:
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:  # the converter checks nothing: KeyError, TypeError, AssertionError, RecursionError, ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInput(f"this JSON schema cannot be made a grammar: {reason}") from error
