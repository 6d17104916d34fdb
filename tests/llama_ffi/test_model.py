"""The vocabulary of a model, and what is left of it once it is closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from bpe_vocabulary import write_bpe_vocabulary, write_no_vocabulary

from kvcompose_local.engines import open_engine
from kvcompose_local.errors import EngineError
from kvcompose_local.llama_ffi.model import Model


def written(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Path(writer.path)


#: Vocabularies of every type that llama.cpp has defaults for: (its name, the tokens at its end, beside the bytes).
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BPE = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
VOCABULARIES = {
    "llama": ["<unk>", "<s>", "</s>", *BYTES],
    "gpt2": [*BPE, "<s>", "</s>"],
    "t5": ["<pad>", "<x>", "<unk>", "<s>", "</s>", "▁hi", "h", "i", "▁"],
    "rwkv": ["<unk>", *(chr(b) for b in range(1, 127)), "<s>", "</s>"],
}


def header_of(
    folder: Path, kind: str, *, template: str = "", markers: tuple[str, ...] = (), **values: int | bool | list[int]
) -> Model:
    """A header with a vocabulary of that type, more control tokens behind it, and ``tokenizer.ggml`` values."""
    tokens = [*VOCABULARIES[kind], *markers]
    writer = gguf.GGUFWriter(str(folder / f"{kind}.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(["a a"])
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    types = gguf.TokenType
    writer.add_token_types(
        [
            types.CONTROL if t in ("<s>", "</s>", *markers) else types.BYTE if t.startswith("<0x") else types.NORMAL
            for t in tokens
        ]
    )
    if template:
        writer.add_chat_template(template)
    for name, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    return Model(written(writer), header_only=True)


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_special_tokens_are_the_header_s(tmp_path: Path, kind: str) -> None:
    """llama.cpp has defaults by type: 1 and 2, 11 and 11, none and 1, none and none."""
    bos, eos = (VOCABULARIES[kind].index(text) for text in ("<s>", "</s>"))
    named = header_of(tmp_path, kind, bos_token_id=bos, eos_token_id=eos, add_bos_token=True, add_eos_token=True)
    plain = named.tokenize("hi")
    assert named.tokenize("hi", add_bos=True) == [bos, *plain]
    assert bos not in plain
    assert eos not in plain
    assert named.adds_bos
    assert (named.special_text("bos"), named.special_text("eos")) == ("<s>", "</s>")
    assert [token for token in range(named.n_vocab) if named.is_end(token)] == [eos]
    for values in ({}, {"bos_token_id": 10**6, "eos_token_id": 10**6}, {"add_bos_token": True, "add_eos_token": True}):
        bare = header_of(tmp_path, kind, **values)
        assert not bare.adds_bos
        assert (bare.special_text("bos"), bare.special_text("eos")) == ("", "")
        assert bare.tokenize("hi", add_bos=True) == plain
        # the text of the token says so, and nothing else does
        assert [token for token in range(bare.n_vocab) if bare.is_end(token)] == [eos]


@pytest.mark.parametrize(("kind", "adds"), [("llama", True), ("gpt2", False), ("t5", False), ("rwkv", False)])
def test_a_header_that_does_not_tell_whether_bos_is_added(tmp_path: Path, kind: str, adds: bool) -> None:
    """The type of the vocabulary tells, as in llama.cpp."""
    bos = VOCABULARIES[kind].index("<s>")
    assert header_of(tmp_path, kind, bos_token_id=bos).adds_bos == adds
    assert not header_of(tmp_path, kind, bos_token_id=bos, add_bos_token=False).adds_bos


def test_further_ends(tmp_path: Path) -> None:
    """The end of a turn that a header names beside EOS, and a list of ends."""
    model = header_of(tmp_path, "gpt2", eos_token_id=3, eot_token_id=11, eos_token_ids=[3, 7, 257])
    ends = {token for token in range(model.n_vocab) if model.is_end(token)}
    assert ends == {3, 11, 7, 257}
    assert model.token_bytes(11) == b","


TURNS = "{% for m in messages %}{{ BEGIN }}{{ m.role }}:{{ m.content }}{{ END }}{% endfor %}"


@pytest.mark.parametrize(
    ("begin", "end", "ends"),
    [
        ("''", "'<|stop_here|>\\n'", {"<|stop_here|>"}),  # behind every message
        ("'<|speaker|>'", "'\\n'", {"<|speaker|>"}),  # nothing but the next one's begin
        ("'<|speaker|>'", "'<|stop_here|>'", {"<|stop_here|>"}),
        ("''", "eos_token", set()),  # what the header says ends them
        ("'<|speaker|>'", "'</s>'", set()),
        ("'' if m.role != 'last' else '</s>'", "'<|stop_here|>'", set()),  # gpt-oss: may stand within an answer
        ("''", "'\\n'", set()),
        ("raise_exception('no') + ''", "'<|stop_here|>'", set()),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_template_tells_what_ends_a_turn(tmp_path: Path, kind: str, begin: str, end: str, ends: set[str]) -> None:
    """llama.cpp has no list of such markers: without this, an answer runs on until it is cut."""
    template = TURNS.replace("BEGIN", begin).replace("END", end)
    markers = ("<|speaker|>", "<|stop_here|>")
    model = header_of(tmp_path, kind, template=template, markers=markers, eos_token_id=VOCABULARIES[kind].index("</s>"))
    assert {model.token_text(t) for t in range(model.n_vocab) if model.is_end(t)} == {"</s>", *ends}
    model.use_template("plain")
    assert {model.token_text(t) for t in range(model.n_vocab) if model.is_end(t)} == {"</s>"}


def test_a_closed_model_says_so(tiny_model: Callable[..., Path]) -> None:
    engine, _ = open_engine(tiny_model("llama"), n_ctx=256, budget=1.0, n_threads=1)
    model = engine.model
    tokens = model.tokenize("hello")
    engine.close()
    for use in (
        lambda: model.tokenize("hello"),
        lambda: model.token_bytes(3),
        lambda: model.is_end(2),
        lambda: model.n_vocab,
        lambda: engine.decode(tokens),
        lambda: engine.layout(),
    ):
        with pytest.raises(EngineError, match="closed"):
            use()
    model.close()  # again does nothing


def test_a_model_without_a_vocabulary_cannot_chat(tmp_path: Path) -> None:
    """llama.cpp asserts where it is given text."""
    assert Model(write_bpe_vocabulary(tmp_path / "some.gguf", "gpt-2"), header_only=True).can_generate
    assert not Model(write_no_vocabulary(tmp_path / "none.gguf"), header_only=True).can_generate


def test_a_header_that_was_closed_says_so(tmp_path: Path) -> None:
    model = Model(write_bpe_vocabulary(tmp_path / "vocabulary.gguf", "gpt-2"), header_only=True)
    model.close()
    with pytest.raises(EngineError, match="closed"):
        _ = model.name
