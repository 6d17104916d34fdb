"""JSON schemas as grammars, and no schema whose answers might not satisfy it.

llama-cpp-python's converter ignores what it does not know, and some of what it writes is no JSON. So a schema is first
made one that says less: whatever the converter would get wrong is rewritten or refused, with the place where it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from kvcompose_local.chat.calls import ToolFormat
from kvcompose_local.errors import InvalidInput
from kvcompose_local.llama_ffi.grammar import gbnf_of_schema

Schema = dict[str, Any]

#: Keywords of which one says all.
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
#: Keywords that say nothing of what is valid.
_ANNOTATIONS = frozenset(
    "title description default examples example $schema $id $comment deprecated readOnly writeOnly discriminator "
    "contentMediaType contentEncoding strict name".split()
)
#: What each type may have beside.
_OF_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset[str](),
    "integer": frozenset[str](),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_FORMATS = ("date", "time", "date-time", "uuid")
_ANYTHING = {"anyOf": [{"type": name} for name in ("string", "number", "boolean", "null", "object", "array")]}
#: Patterns that a grammar says alike: letters, digits, classes of them, groups and counts.
_PATTERN = re.compile(r"\^(?:[A-Za-z0-9 _:/@#,=|(){}*+?-]|\[(?!\^)[A-Za-z0-9 _:/@#,=+-]+\])*\$")
#: Bounds of a schema: how deep, how many parts, items and characters its answers may have to have.
_DEEPEST, _MOST_PARTS, _MOST_ITEMS, _MOST_CHARACTERS, _MOST_VALUES = 24, 2000, 128, 512, 500

#: A character of a string: no control characters, and no halves of a surrogate pair.
_CHAR = r'char ::= [^"\\\x00-\x1F\x7F] | "\\" ["\\/bfnrt]'
#: An exponent that every reader of JSON can hold.
_EXPONENT = "[eE] [-+]? [0-9] [0-9]?"


def grammar_of(schema: Any) -> str:
    """A grammar whose texts are all valid by the schema. Raises InvalidInput, with the reason, where there is none."""
    narrowed = _Narrowed()
    return _gbnf(narrowed.whole(narrowed.add(schema)))


def grammar_of_call(form: ToolFormat, functions: Sequence[Any]) -> str:
    """A grammar of a call of one of these functions, as JSON of name and arguments.

    All readers take that, also those of notations that have no JSON.
    """
    narrowed = _Narrowed()
    calls = [
        {
            "type": "object",
            "properties": {
                form.named: {"enum": [function["name"]]},
                form.arguments: narrowed.add(arguments_of(function)),
            },
            "required": [form.named, form.arguments],
            "additionalProperties": False,
        }
        for function in functions
    ]
    call: Schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form.is_list:
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
    return _gbnf(narrowed.whole(call))


def arguments_of(function: Any) -> Any:
    """The schema of a function's arguments; one that tells none has none."""
    schema = function.get("parameters") or {"type": "object"}
    if isinstance(schema, dict) and not (
        schema.get("properties") or schema.keys() & {"additionalProperties", *_COMBINING}
    ):
        return {**schema, "additionalProperties": False}
    return schema


def grammar_of_either(answer: str, form: ToolFormat, functions: Sequence[Any]) -> str:
    """A grammar of what one allows, and of calls of these functions as models write them.

    A function whose arguments no grammar can say takes any.
    """
    sayable = []
    for function in functions:
        try:
            grammar_of(arguments_of(function))
        except InvalidInput:
            function = {"name": function["name"], "parameters": {"type": "object", "additionalProperties": True}}
        sayable.append(function)
    call = "call-root"
    if form.opens:
        closed = f' "\\n"? {_quoted(form.closes[0])} "\\n"?' if form.closes else ""
        call += f' | ({_quoted(form.opens[0])} "\\n"? call-root{closed})+'
    parts = (_renamed(answer, "answer-"), _renamed(grammar_of_call(form, sayable), "call-"))
    return "\n".join((f"root ::= answer-root | {call}", *parts))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _renamed(gbnf: str, prefix: str) -> str:
    """The same grammar, whose rules have longer names."""
    parts = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|([A-Za-z][\w-]*)')
    return parts.sub(lambda found: prefix + found[1] if found[1] else found[0], gbnf)


def _gbnf(schema: Schema) -> str:
    gbnf = gbnf_of_schema(schema)
    gbnf = re.sub(r"^char ::= .*$", lambda _: _CHAR, gbnf, flags=re.MULTILINE)
    pair = r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})"  # one character, of which the converter makes two
    gbnf = re.sub(pair, lambda found: bytes.fromhex(found[1] + found[2]).decode("utf-16-be"), gbnf)
    return gbnf.replace("[eE] [-+]? integral-part", _EXPONENT)


class _Narrowed:
    """Schemas that say no more than the given ones, in words that the converter gets right."""

    def __init__(self) -> None:
        self._given: Any = None
        self._names: dict[str, str] = {}
        self._definitions: Schema = {}
        self._n_names = self._n_parts = 0

    def add(self, schema: Any) -> Schema:
        """One more schema, whose references are to its own parts, as a part of :meth:`whole`."""
        self._given, self._names = schema, {}
        return self._visit(schema, "", 0)

    def whole(self, root: Schema) -> Schema:
        """A schema of what :meth:`add` made."""
        root = {"anyOf": [root]} if "$ref" in root else root  # the converter knows none at the root
        return {**root, "$defs": self._definitions} if self._definitions else root

    def _fail(self, place: str, reason: str) -> InvalidInput:
        return InvalidInput(f"the schema cannot be followed: {place or 'its root'} {reason}")

    def _visit(self, schema: Any, place: str, depth: int) -> Schema:
        self._n_parts += 1
        if depth > _DEEPEST or self._n_parts > _MOST_PARTS:
            raise self._fail(place, "is too deep, or the whole is too large")
        if schema is True:
            return dict(_ANYTHING)
        if not isinstance(schema, dict):
            raise self._fail(place, "allows nothing, or is no schema")
        told = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        told.pop("$defs", None)
        told.pop("definitions", None)
        if not told:
            return dict(_ANYTHING)
        for key in _COMBINING:
            if key in told:
                return self._combined(key, told, place, depth)
        if "const" in told or "enum" in told:
            return self._values(told, place)
        kinds = told.pop("type", None)
        if isinstance(kinds, list):
            alternatives = [self._typed(kind, told, place, depth, alone=len(kinds) == 1) for kind in kinds]
            return {"anyOf": alternatives} if alternatives else self._nothing(place)
        if kinds is None:
            kinds = next((kind for kind, keys in _OF_TYPE.items() if told.keys() & keys), None)
        return self._typed(kinds, told, place, depth, alone=True)

    def _nothing(self, place: str) -> Schema:
        raise self._fail(place, "allows nothing")

    def _combined(self, key: str, told: Schema, place: str, depth: int) -> Schema:
        value = told.pop(key)
        if told.keys() - {"type"} or ("type" in told and key != "allOf" and told["type"] != "object"):
            raise self._fail(place, f"has {', '.join(sorted(told))} beside {key}")
        if key == "$ref":
            return self._reference(value, place, depth)
        if not isinstance(value, list) or not value:
            raise self._fail(place, f"has no list in {key}")
        if key == "allOf" and len(value) > 1:
            raise self._fail(place, "has allOf of several schemas")
        if key == "oneOf" and not _are_apart(value):
            raise self._fail(place, "has oneOf of schemas that one value may satisfy together: say anyOf")
        parts = [self._visit(part, f"{place}/{key}/{i}", depth + 1) for i, part in enumerate(value)]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _reference(self, ref: Any, place: str, depth: int) -> Schema:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise self._fail(place, "refers to what is not in it")
        if ref not in self._names:
            name = self._names[ref] = f"part-{self._n_names}"
            self._n_names += 1
            target = self._given
            for step in ref[2:].split("/") if ref != "#" else ():
                step = step.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or step not in target:
                    raise self._fail(place, f"refers to {ref[:80]}, which is not there")
                target = target[step]
            self._definitions[name] = self._visit(target, ref[1:], depth + 1)
        return {"$ref": f"#/$defs/{self._names[ref]}"}

    def _values(self, told: Schema, place: str) -> Schema:
        values = [told["const"]] if "const" in told else told["enum"]
        if told.keys() - {"const", "enum", "type"} or not isinstance(values, list):
            raise self._fail(place, "has more than values and a type")
        kinds = told.get("type")
        if kinds is not None:
            wanted = kinds if isinstance(kinds, list) else [kinds]
            values = [value for value in values if any(_is_of(value, kind) for kind in wanted)]
        if not values or len(values) > _MOST_VALUES:
            raise self._fail(place, "has no values, or too many")
        for value in values:
            if not _is_plain(value):
                raise self._fail(place, "has a value with quotes, backslashes or control characters in it")
        return {"enum": values}

    def _typed(self, kind: Any, told: Schema, place: str, depth: int, *, alone: bool) -> Schema:
        if not isinstance(kind, str) or kind not in _OF_TYPE:
            raise self._fail(place, f"has a type that nobody knows: {str(kind)[:40]}")
        known = frozenset().union(*_OF_TYPE.values())
        if unknown := told.keys() - (_OF_TYPE[kind] if alone else known):
            raise self._fail(place, f"has {', '.join(sorted(unknown))[:80]}, which a grammar cannot say")
        own = {key: value for key, value in told.items() if key in _OF_TYPE[kind]}
        if kind == "object":
            return self._object(own, place, depth)
        if kind == "array":
            return self._array(own, place, depth)
        if kind == "string":
            return self._string(own, place)
        return {"type": kind}

    def _object(self, told: Schema, place: str, depth: int) -> Schema:
        properties, required = told.get("properties", {}), told.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise self._fail(place, "has properties that are none")
        if not all(isinstance(name, str) and name in properties for name in required):
            raise self._fail(place, "requires what is not among its properties")
        more = told.get("additionalProperties", True)
        if not properties:
            if more is True or more == {}:
                return {"type": "object"}
            value = False if more is False else self._visit(more, f"{place}/additionalProperties", depth + 1)
            return {"type": "object", "properties": {}, "additionalProperties": value}
        for name in properties:
            if not name:  # the converter would call its rule as it calls the whole
                raise self._fail(place, "has a property without a name")
            if not _is_plain(name):
                raise self._fail(place, "has a property with quotes, backslashes or control characters in its name")
        parts = {name: self._visit(part, f"{place}/properties/{name}", depth + 1) for name, part in properties.items()}
        # Another property might have a name of these, and not their type.
        return {"type": "object", "properties": parts, "required": [*required], "additionalProperties": False}

    def _array(self, told: Schema, place: str, depth: int) -> Schema:
        least, most = (self._count(told, key, place, _MOST_ITEMS) for key in ("minItems", "maxItems"))
        items = told.get("items", True)
        tuple_items = told.get("prefixItems", items if isinstance(items, list) else None)
        if tuple_items is not None:
            if not isinstance(tuple_items, list):
                raise self._fail(place, "has prefixItems that are no list")
            n = len(tuple_items)
            if not n or n < (least or 0) or n > (n if most is None else most):
                raise self._fail(place, "has a list of items, and another number of them")
            parts = [self._visit(part, f"{place}/prefixItems/{i}", depth + 1) for i, part in enumerate(tuple_items)]
            return {"type": "array", "prefixItems": parts}
        if most == 0:
            return {"enum": [[]]}
        if (least or 0) > (_MOST_ITEMS if most is None else most):
            raise self._fail(place, "wants more items than it allows")
        bounds = {"minItems": least} if least else {}
        bounds |= {"maxItems": most} if most is not None else {}
        return {"type": "array", "items": self._visit(items, f"{place}/items", depth + 1), **bounds}

    def _string(self, told: Schema, place: str) -> Schema:
        least, most = (self._count(told, key, place, _MOST_CHARACTERS) for key in ("minLength", "maxLength"))
        pattern = told.get("pattern")
        if pattern is not None:
            if least is not None or most is not None:
                raise self._fail(place, "has a pattern and a length")
            if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern) or "(?" in pattern:
                raise self._fail(place, "has a pattern that a grammar cannot say: ^…$ of letters, digits and classes")
            if any(
                len(n) > 4 or int(n) > _MOST_ITEMS
                for n in re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", pattern)))
            ):
                raise self._fail(place, "has a pattern that repeats too often")
            try:
                re.compile(pattern)
            except re.error as error:
                raise self._fail(place, f"has a pattern that is none: {error}") from error
            return {"type": "string", "pattern": f"^({pattern[1:-1]})$"}  # alternatives stand between the quotes
        if least is not None or most is not None:
            if (least or 0) > (_MOST_CHARACTERS if most is None else most):
                raise self._fail(place, "wants more characters than it allows")
            bounds = {"minLength": least or 0} | ({"maxLength": most} if most is not None else {})
            return {"enum": [""]} if most == 0 else {"type": "string", **bounds}
        kind = told.get("format")
        return {"type": "string", **({"format": kind} if kind in _FORMATS else {})}

    def _count(self, told: Schema, key: str, place: str, most: int) -> int | None:
        value = told.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._fail(place, f"has a {key} that is no number of things")
        if value > most:
            raise self._fail(place, f"has a {key} above {most}, which is too much for a grammar")
        return value


def _is_plain(value: Any) -> bool:
    """Whether the converter can write a value down: it forgets to escape what JSON escapes."""
    if isinstance(value, str):
        return not re.search(r'["\\\x00-\x1f\x7f\ud800-\udfff]', value)
    if isinstance(value, dict):
        return all(_is_plain(part) for part in (*value, *value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and abs(value) < 1e300)


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return bool(kind == "boolean")
    if isinstance(value, (int, float)):
        return bool(kind == "number" or (kind == "integer" and value == int(value)))
    kinds: dict[type, str] = {str: "string", dict: "object", list: "array", type(None): "null"}
    return bool(kinds[type(value)] == kind)


def _are_apart(parts: Sequence[Any]) -> bool:
    """Whether no value can satisfy two of these schemas: they differ in type, or in a constant that they require."""
    if not all(isinstance(part, dict) for part in parts):
        return False
    kinds = [part.get("type") for part in parts]
    told = [kind for kind in kinds if isinstance(kind, str)]
    numbers = {"integer", "number"} <= set(told)
    if len(told) == len(parts) == len(set(told)) and not numbers:
        return True
    constants: list[dict[str, Any]] = []
    for part in parts:
        properties = part.get("properties")
        required = part.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            return False
        constants.append(
            {
                name: json.dumps(value["const"])
                for name, value in properties.items()
                if isinstance(value, dict) and "const" in value and name in required
            }
        )
    shared = set.intersection(*(set(found) for found in constants)) if constants else set()
    return any(len({found[name] for found in constants}) == len(parts) for name in shared)
