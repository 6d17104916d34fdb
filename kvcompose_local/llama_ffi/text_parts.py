"""Cuts a text into parts that llama.cpp can tokenize one by one, at places where a cut changes no token.

A third of llama.cpp's pre-tokenizers split text into words by ``std::regex``, and libstdc++ recurses once for each
character of a match, with 256 to 512 bytes of stack each. A match over a long stretch (one word, one line of spaces,
for EXAONE a whole line of words) overflows the stack. In a part, no match can be longer than the part.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

#: Characters of a part. A match that long fits a stack of 512 KiB, the smallest that threads of macOS have.
LONGEST_PART = 1024
#: How far before a possible cut a marker such as ``<|im_end|>`` may begin.
_LONGEST_MARKER = 64
_MARKER = re.compile(rf"<[^<>\n]{{1,{_LONGEST_MARKER}}}>|\[[^\[\]\n]{{1,{_LONGEST_MARKER}}}\]")
#: Places to cut, the best first. Pre-tokenizers put spaces before words, and ends of line behind punctuation.
_PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<=\S\n)(?=[^\s/])",  # a single end of line; some take slashes after it to the punctuation before it
        r"(?<=[.,;:!?)\]}])(?= \S)",  # a single space after punctuation: no expression runs over that
        r"(?<=\S)(?= \S)",  # a single space
        r"(?<=[^\W_])(?=\s)",  # a word and what separates it from the next
        r"(?<=[^\W\d_])(?=[^\w\s'])",  # a word and punctuation, as in Chinese and base64
        r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])",  # letters and digits
    )
)


#: Characters of a part of a SentencePiece vocabulary, which takes time by the square of the tokens that are bytes.
LONGEST_SENTENCEPIECE_PART = 8192
#: Its pieces hold white space only where they begin, and a part begins with a space whether there is one or not.
_SENTENCEPIECE_PLACES = tuple(re.compile(pattern) for pattern in (r"(?<=\S)(?= \S)", r"(?<=\S)(?=\n)"))


def parts_of(text: str) -> list[str]:
    """``text`` in parts of at most :data:`LONGEST_PART` characters, cut where no pre-tokenizer's expression matches.

    A stretch without such a place (one word, a line of spaces) is cut at the end of a character, and a token or two
    may differ there from the ones of the whole stretch.
    """
    return _parts(text, LONGEST_PART, _PLACES)


def sentencepiece_parts_of(text: str) -> list[str]:
    """``text`` in parts of at most :data:`LONGEST_SENTENCEPIECE_PART` characters, cut before white space if it can."""
    return _parts(text, LONGEST_SENTENCEPIECE_PART, (*_SENTENCEPIECE_PLACES, *_PLACES))


def _parts(text: str, longest: int, places: Sequence[re.Pattern[str]]) -> list[str]:
    parts, begin = [], 0
    while len(text) - begin > longest:
        end = _cut(text, begin + longest // 2, begin + longest, places)
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def _cut(text: str, first: int, last: int, places: Sequence[re.Pattern[str]]) -> int:
    """The best place to cut in ``first`` to ``last``, the later of equal ones."""
    around = range(first - _LONGEST_MARKER - 2, last + _LONGEST_MARKER + 2)
    markers = [match.span() for match in _MARKER.finditer(text, max(around.start, 0), around.stop)]

    def is_whole(place: int) -> bool:
        return not any(start <= place <= end for start, end in markers) and not _continues(text, place)

    for pattern in places:
        found = [match.start() for match in pattern.finditer(text, first, last + 2)]
        for place in reversed(found):
            if place <= last and is_whole(place):
                return place
    inside = range(last, first, -1)
    ends = (place for place in inside if not _continues(text, place))
    return next((place for place in inside if is_whole(place)), next(ends, last))


def _continues(text: str, place: int) -> bool:
    """Whether the character at a place continues the one before: a combining mark, a joined emoji, an LF."""
    before, after = text[place - 1], text[place]
    return unicodedata.category(after) in ("Mn", "Me", "Mc", "Cf") or before == "\u200d" or before + after == "\r\n"
