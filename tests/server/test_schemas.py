"""Schemas as grammars: whatever a grammar lets through is valid, and what it cannot say is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from tiny_models import write_tiny_model

from kvcompose_local.chat.calls import CallReader
from kvcompose_local.chat.notations import Call
from kvcompose_local.chat.tools import HERMES
from kvcompose_local.errors import InvalidInput
from kvcompose_local.llama_ffi.grammar import Grammar
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.server.schemas import grammar_of, grammar_of_call, grammar_of_either

N_SCHEMAS = 200
_NAMES = ["a", "b", "c-d", "e f", "name", "string", "char", "value", "root", "é", "space", "object"]


def schema_of(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema of what the converter knows."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "length", "pattern", "format", "types"]
    if depth < 3:
        kinds += ["object", "array", "tuple", "anyOf", "map", "oneOf"] * 2
    kind = rng.choice(kinds)
    if kind in ("string", "integer", "number", "boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": rng.sample(["x", "yes no", 3, -1.5, True, None, [1], {"k": "v"}], 3)}
    if kind == "const":
        return {"const": rng.choice(["fixed", 7, None])}
    if kind == "length":
        low = rng.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 5)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,4}$", "^a|b$", "^(x[0-9])+$", "^no?$"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "uuid", "date-time", "email"])}
    if kind == "types":
        return {"type": rng.sample(["string", "integer", "null", "boolean"], 2), "title": "either"}
    if kind == "object":
        names = rng.sample(_NAMES, rng.randint(1, 4))
        properties = {name: schema_of(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        more: Any = rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}])
        return {"type": "object", "properties": properties, "required": required, **more}
    if kind == "map":
        return {"type": "object", "additionalProperties": schema_of(rng, depth + 1)}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": schema_of(rng, depth + 1), "minItems": low, "maxItems": low + 2}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [schema_of(rng, depth + 1) for _ in range(2)]}
    if kind == "oneOf":
        return {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": k}, "n": {"type": "integer"}}, "required": ["kind"]}
                for k in ("cat", "dog")
            ]
        }
    return {"anyOf": [schema_of(rng, depth + 1) for _ in range(2)]}


LIST = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["v", "next"],
        }
    },
    "$ref": "#/$defs/Node",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf"), header_only=True)
    yield model
    model.close()


def drawn(model: Model, gbnf: str, seed: int) -> str | None:
    """A text of random tokens that the grammar allows; None where it has not ended by itself."""
    grammar = Grammar(model, gbnf)
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    rng = np.random.default_rng(seed)
    raw = b""
    try:
        for i in range(600):
            logits = rng.standard_normal(model.n_vocab).astype(np.float32)
            logits[2] += 0.02 * i  # the end
            for byte in b'"}],':  # what ends things
                logits[3 + byte] += 3
            token = grammar.sample(chain, logits)
            if model.is_end(token):
                return raw.decode("utf-8", "replace")  # as the server does
            raw += model.token_bytes(token)
    finally:
        grammar.close()
        lib.llama_sampler_free(chain)
    return None


def test_an_answer_that_ends_by_itself_is_valid(model: Model) -> None:
    n_ended = 0
    for seed in range(N_SCHEMAS):
        schema = schema_of(random.Random(seed))
        gbnf = grammar_of(schema)
        for trial in range(3):
            said = drawn(model, gbnf, 10 * seed + trial)
            if said is not None:
                n_ended += 1
                jsonschema.validate(json.loads(said), schema, cls=jsonschema.Draft202012Validator)
    assert n_ended > 2 * N_SCHEMAS


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "minimum": 3}, "minimum"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "requires"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"allOf": [{"type": "string"}, {"type": "string"}]}, "allOf"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "a.*b"}, "pattern"),
        ({"type": "string", "pattern": '^"$'}, "pattern"),
        ({"type": "string", "pattern": "^(a$"}, "pattern"),
        ({"type": "string", "maxLength": 10**9}, "maxLength"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "more characters"),
        ({"type": "array", "minItems": -1}, "minItems"),
        ({"enum": ['say "hi"']}, "quotes"),
        ({"enum": []}, "no values"),
        ({"type": "object", "properties": {"a\\b": {}}}, "backslashes"),
        ({"$ref": "https://example.org/x"}, "refers"),
        ({"$ref": "#/$defs/none"}, "not there"),
        ({"type": "nothing"}, "type"),
        ({"properties": {"a": False}}, "allows nothing"),
        ("string", "no schema"),
        ({"type": "array", "minItems": float("inf")}, "minItems"),
        ({"type": "array", "maxItems": float("nan")}, "maxItems"),
        ({"type": "array", "prefixItems": 5}, "prefixItems"),
        ({"type": "object", "properties": {"a": {}}, "required": [["a"]]}, "requires"),
        ({"type": "object", "properties": {"": {}}}, "without a name"),
        ({"type": "string", "pattern": f"^a{{{'9' * 5000}}}$"}, "too often"),
    ],
)
def test_what_a_grammar_cannot_say_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        grammar_of(schema)


def test_a_schema_that_refers_to_itself(model: Model) -> None:
    tree = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/string"}}}
    schema = {**tree, "$defs": {"string": {**tree, "required": ["v"]}}, "required": ["v"]}
    said = [drawn(model, grammar_of(schema), seed) for seed in range(10)]
    ended = [json.loads(text) for text in said if text is not None]
    assert ended
    for value in ended:
        jsonschema.validate(value, schema)


@pytest.mark.parametrize(
    "schema",
    [
        LIST,
        {"type": "object", "properties": {"in": {"type": "array", "items": {"$ref": "#"}}}, "required": ["in"]},
        {"enum": ["😀 happy", "𝒳", "é"]},
        {"type": "object", "properties": {"😀": {"const": "𠀀"}}, "required": ["😀"]},
    ],
)
def test_references_at_the_root_and_characters_beyond_16_bits(model: Model, schema: Any) -> None:
    said = [drawn(model, grammar_of(schema), seed) for seed in range(10)]
    ended = [json.loads(text) for text in said if text is not None]
    assert ended
    for value in ended:
        jsonschema.validate(value, schema)


def test_calls_of_functions_that_refer_to_their_own_parts(model: Model) -> None:
    other = json.loads(json.dumps(LIST).replace('"v"', '"w"'))
    parameters = {"one": LIST, "other": other, "none": {"type": "object", "properties": {}}, "nothing": None}
    functions = [{"name": name, "parameters": of} for name, of in parameters.items()]
    said = [drawn(model, grammar_of_call(HERMES, functions), seed) for seed in range(40)]
    calls = [json.loads(text) for text in said if text is not None]
    assert {call["name"] for call in calls} == parameters.keys()
    for call in calls:
        if parameters[call["name"]] in (LIST, other):
            jsonschema.validate(call["arguments"], parameters[call["name"]])
        else:
            assert call["arguments"] == {}


def test_an_answer_of_a_form_or_calls(model: Model) -> None:
    answer = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    functions = [{"name": "look", "parameters": LIST}, {"name": "any", "parameters": {"not": {}}}]
    gbnf = grammar_of_either(grammar_of(answer), HERMES, functions)
    kinds = set()
    for seed in range(60):
        said = drawn(model, gbnf, seed)
        if said is None:
            continue
        reader = CallReader(HERMES, {"look": LIST, "any": {}})
        parts = [*reader.take(said), *reader.finish()]
        kinds |= {type(part) for part in parts}
        for part in parts:
            if isinstance(part, Call):
                jsonschema.validate(part.arguments, LIST if part.name == "look" else {"type": "object"})
            elif part.strip():
                jsonschema.validate(json.loads(part), answer)
    assert kinds == {str, Call}


def test_endless_recursion_is_refused_in_time(model: Model) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidInput, match="deep"):
        grammar_of(deep)
    with pytest.raises(InvalidInput):
        Grammar(model, grammar_of({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}))
