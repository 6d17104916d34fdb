"""What encoding bytes are guessed to be text in, and that iconv knows it by that name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvcompose_local.chat.encodings import guesses, seven_bit
from kvcompose_local.chat.inputs import text_of
from kvcompose_local.errors import InvalidInput

TEXTS = {
    "Japanese": "港の事務所は九時に開きます。書類をお持ちください。東京タワーへ行きましょう。\n",
    "Chinese": "港口办公室九点开门。请带上您的文件，谢谢！我们明天去北京大学参加一个重要的会议。\n",
    "Taiwanese": "港口辦公室九點開門。請帶上您的文件，謝謝！我們明天去台北參加一個重要的會議。\n",
    "Korean": "항구 사무실은 아홉 시에 문을 엽니다. 서류를 가져오십시오. 내일 서울에 갑니다.\n",
    "Russian": "Портовая контора открывается в девять часов. Принесите, пожалуйста, документы!\n",
    "Greek": "Το γραφείο του λιμανιού ανοίγει στις εννέα. Παρακαλώ φέρτε τα έγγραφά σας.\n",
    "Hebrew": "משרד הנמל נפתח בתשע. נא להביא את המסמכים שלכם.\n",
    "Arabic": "يفتح مكتب الميناء في الساعة التاسعة. يرجى إحضار المستندات.\n",
    "Thai": "สำนักงานท่าเรือเปิดเวลาเก้าโมง กรุณานำเอกสารของคุณมา\n",
    "French": "Le bureau ouvre à neuf heures. Apportez vos pièces d’identité, s’il vous plaît – à bientôt.\n",
    "German": "Das Büro öffnet um neun. Bitte Ausweise für Männer mitführen, größer als üblich. Grüße!\n",
    "English": "The harbour office opens at nine. Please bring your documents; the code is 42.\n",
}
CASES = [
    ("Japanese", "cp932", "SHIFT_JIS"),
    ("Japanese", "euc_jp", "EUC-JP"),
    ("Chinese", "gb18030", "GB18030"),
    ("Taiwanese", "big5", "BIG5"),
    ("Korean", "euc_kr", "EUC-KR"),
    ("Russian", "cp1251", "WINDOWS-1251"),
    ("Russian", "koi8_r", "KOI8-R"),
    ("Russian", "cp866", "IBM866"),
    ("Russian", "iso8859_5", "ISO-8859-5"),
    ("Greek", "cp1253", "WINDOWS-1253"),
    ("Hebrew", "cp1255", "WINDOWS-1255"),
    ("Arabic", "cp1256", "WINDOWS-1256"),
    ("Thai", "iso8859_11", "TIS-620"),
    ("French", "cp1252", "WINDOWS-1252"),
    ("German", "cp1252", "WINDOWS-1252"),
    ("English", "cp037", "IBM1047"),
    ("German", "cp500", "IBM1047"),
]


@pytest.mark.parametrize(("language", "codec", "name"), CASES)
@pytest.mark.parametrize("n", [1, 40])
def test_the_likeliest_encoding(language: str, codec: str, name: str, n: int) -> None:
    raw = (TEXTS[language] * n).encode(codec)
    assert guesses(raw)[0] == name
    with pytest.raises(InvalidInput) as error:
        text_of(raw, Path("x.txt"))
    assert f"`iconv -f {name} -t UTF-8 x.txt > x.utf8.txt` may convert it" in str(error.value)
    if shutil.which("iconv"):
        done = subprocess.run(["iconv", "-f", name, "-t", "UTF-8"], input=raw, capture_output=True, check=True)
        assert name == "IBM1047" or done.stdout.decode() == TEXTS[language] * n


def test_a_second_is_named_where_several_fit() -> None:
    with pytest.raises(InvalidInput, match=r"iconv -f EUC-KR .* \(or from GB18030\)"):
        text_of(TEXTS["Korean"].encode("euc_kr"), Path("x.txt"))


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize(
    ("language", "codec", "name"),
    [
        ("Japanese", "iso2022_jp", "ISO-2022-JP"),
        ("Korean", "iso2022_kr", "ISO-2022-KR"),
        ("German", "utf-7", "UTF-7"),
        ("Russian", "utf-7", "UTF-7"),
        ("Japanese", "utf-7", "UTF-7"),
    ],
)
def test_what_looks_like_ascii_and_is_none(language: str, codec: str, name: str, n: int) -> None:
    raw = (TEXTS[language] * n).encode(codec)
    with pytest.raises(InvalidInput) as error:
        text_of(raw, Path("x.txt"))
    assert str(error.value) == f"x.txt is {name} text: `iconv -f {name} -t UTF-8 x.txt > x.utf8.txt` converts it"


@pytest.mark.parametrize(
    "text",
    [
        TEXTS["English"],
        "a +b- c",
        "x = a+b-c+d-e; i++; j--",
        "--- a\n+++ b\n+foo-bar\n+xyz-abc\n",
        "+foo-bar +baz-\n+xyz-abc",
        "call +49-123-456 or +1-202-555",
        "\x1b[1mbold\x1b(B\x1b[m",
        "$self->{+ENCODING} or $self->{+ENCODING}; $_[0]->{+ENCODING}",
        "git diff +ours- +theirs- +base-",
    ],
)
def test_ascii_stays_ascii(text: str) -> None:
    assert seven_bit(text.encode()) is None
    assert text_of(text.encode(), Path("x")) == text


def test_sources_are_ascii() -> None:
    for path in Path(__file__).parent.glob("*.py"):
        assert seven_bit(path.read_bytes()) is None
