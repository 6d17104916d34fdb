"""Guesses of what encoding bytes are text, from the characters that each would make of them.

A guess is advice: nothing is read by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_SAMPLE_BYTES = 1 << 16
EBCDIC = "IBM1047"
#: Letters of which three quarters of a Russian or Greek text are made.
_FREQUENT = frozenset("оеаинтсрвлкмдпуαοιετσνηυρπκμλςάέήίόύώ")
_LATIN = frozenset("àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿœšžßÀÁÂÄÅÆÇÈÉÊËÍÎÑÓÔÖØÙÚÜ")
_SIGNS = frozenset("“”„‘’‚–—…•€£§°·«»©®™¿¡½¼²³ªº \u00a0")


def _kanji(char: str, codec: str, first: int, last: int) -> float:
    """Frequent characters stand in front in the tables of Chinese and Japanese."""
    raw = char.encode(codec, "ignore")
    return 1.0 if len(raw) == 2 and first <= raw[0] <= last else -0.5


def _japanese(char: str) -> float:
    if "\u3041" <= char <= "\u30ff":
        return 1.2
    return _kanji(char, "euc_jp", 0xB0, 0xCF) * 0.7 if "\u4e00" <= char <= "\u9fff" else _sign(char)


def _chinese(codec: str, first: int, last: int) -> Callable[[str], float]:
    def weight(char: str) -> float:
        if "\u3041" <= char <= "\u30ff":
            return -1
        return _kanji(char, codec, first, last) * 0.9 if "\u3400" <= char <= "\u9fff" else _sign(char)

    return weight


def _korean(char: str) -> float:
    return 1.1 if "\uac00" <= char <= "\ud7a3" else -1 if "\u4e00" <= char <= "\u9fff" else _sign(char)


def _sign(char: str) -> float:
    return 0.5 if "\u3000" <= char <= "\u3020" or "\uff01" <= char <= "\uff5e" or char in _SIGNS else -1


def _letters(first: str, last: str) -> Callable[[str], float]:
    """Of an alphabet: frequent small letters for more than capitals, which a wrong table makes of small ones."""

    def weight(char: str) -> float:
        if not first <= char <= last:
            return 0.2 if char in _SIGNS else -1
        return 1.0 if char in _FREQUENT else 0.6 if char.islower() else 0.1 if char.isupper() else 0.9

    return weight


def _thai(char: str) -> float:
    return 0.6 if "ก" <= char <= "๛" else -1  # most bytes are a letter there


def _latin(char: str) -> float:
    return 0.6 if char in _LATIN else 0.4 if char in _SIGNS else -1


#: The encodings by the names of iconv, Python's codec, and what a character beyond ASCII speaks for it.
_WEIGHTS: tuple[tuple[str, str, Callable[[str], float]], ...] = (
    ("WINDOWS-1252", "cp1252", _latin),
    ("GB18030", "gb18030", _chinese("gb2312", 0xB0, 0xD7)),
    ("SHIFT_JIS", "cp932", _japanese),
    ("EUC-JP", "euc_jp", _japanese),
    ("EUC-KR", "cp949", _korean),
    ("BIG5", "big5", _chinese("big5", 0xA4, 0xC6)),
    ("WINDOWS-1251", "cp1251", _letters("Ѐ", "ӿ")),
    ("KOI8-R", "koi8_r", _letters("Ѐ", "ӿ")),
    ("IBM866", "cp866", _letters("Ѐ", "ӿ")),
    ("ISO-8859-5", "iso8859_5", _letters("Ѐ", "ӿ")),
    ("WINDOWS-1253", "cp1253", _letters("Ͱ", "Ͽ")),
    ("WINDOWS-1255", "cp1255", _letters("א", "ת")),
    ("WINDOWS-1256", "cp1256", _letters("،", "ۿ")),
    ("TIS-620", "iso8859_11", _thai),
)
_WORD = re.compile(r"[^\W\d_]+")
#: Between their words no space is needed, nor between them and Latin ones.
_WITHOUT_SPACES = frozenset(("GB18030", "SHIFT_JIS", "EUC-JP", "EUC-KR", "BIG5", "TIS-620"))
_ENDED = re.compile(rb"\x1b\$[@B]|\x1b\$\([@BD]")
#: Together so long, they are no chance.
_LONG_SHIFTED = 24
_SHIFTED = re.compile(rb"\+([A-Za-z0-9+/]+)-?")


def guesses(raw: bytes) -> list[str]:
    """The likeliest encodings of bytes beyond UTF-8, by the names of iconv, best first; empty where none fits."""
    part = raw[:_SAMPLE_BYTES]
    if _is_ebcdic(part):
        return [EBCDIC, "IBM037"]
    found = []
    for name, codec, weight in _WEIGHTS:
        try:
            text = part.decode(codec)
        except UnicodeDecodeError as error:
            if error.end < len(part) - 4 or len(part) < _SAMPLE_BYTES:
                continue
            text = part[: error.start].decode(codec)
        beyond = [char for char in text if char > "\x7f"]
        score = sum(map(weight, beyond))
        if name not in _WITHOUT_SPACES:
            score += _n_in_latin_words(text) * (0.4 if weight is _latin else -1.5)
        if score > 0:
            found.append((-score / len(beyond), name))
    return [name for _, name in sorted(found)]


def _n_in_latin_words(text: str) -> int:
    """How many letters beyond ASCII stand among ASCII's, or alone: so do letters with accents, and few of others."""
    words = [word for word in _WORD.findall(text) if not word.isascii()]
    of_latin = (word for word in words if len(word) == 1 or re.search("[A-Za-z]", word))
    return sum(char > "\x7f" for word in of_latin for char in word)


def seven_bit(raw: bytes) -> str | None:
    """The encoding of bytes that look like ASCII and are none; None for ASCII."""
    if _ENDED.search(raw):
        return "ISO-2022-JP"
    if raw.startswith(b"\x1b$)C"):
        return "ISO-2022-KR"
    runs = [run for run in _SHIFTED.findall(raw) if len(run) > 2]
    n_shifted = sum(map(len, runs))
    if (len(runs) < 2 and n_shifted < _LONG_SHIFTED) or not raw.isascii():
        return None
    try:
        beyond = [char for char in raw.decode("utf-7") if char > "\x7f"]
    except UnicodeDecodeError:  # as by a + that is one
        return None
    # What other text has between plus and minus makes characters of anywhere.
    is_text = len(set(runs)) > 1 and all(char < "\u0700" or "\u2010" <= char <= "\u20ac" for char in beyond)
    is_kanji = n_shifted >= _LONG_SHIFTED and sum("\u3000" <= char <= "\u9fff" for char in beyond) * 10 > 9 * len(
        beyond
    )
    return "UTF-7" if beyond and (is_text or is_kanji) else None


def _is_ebcdic(raw: bytes) -> bool:
    """Whether bytes are a text of IBM's large machines, whose space is ASCII's @."""
    text = raw.decode("cp037").lower()
    n_plain = sum(char in "abcdefghijklmnopqrstuvwxyz .,0123456789" for char in text)
    return raw.count(b"\x40") > 5 * raw.count(b"\x20") and n_plain * 10 > 8 * len(raw)
