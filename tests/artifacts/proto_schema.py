"""Triton's schema of `config.pbtxt`, from its own .proto: a parser of the syntax that it uses."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[1] / "data" / "triton" / "model_config.proto"
_TOKEN = re.compile(r"\w+(?:\.\w+)*|[{}<>,;=]|\"[^\"]*\"")


def parse(text: str) -> Any:
    """The `ModelConfig` message of a text.

    Raises:
        google.protobuf.text_format.ParseError: an unknown field, or a value of another type.
    """
    pool = _module("descriptor_pool").DescriptorPool()
    pool.Add(_file())
    described = pool.FindMessageTypeByName("inference.ModelConfig")
    message = _module("message_factory").GetMessageClass(described)()
    return _module("text_format").Parse(text, message)


def _module(name: str) -> Any:
    return import_module(f"google.protobuf.{name}")


def _file() -> Any:
    lines = [line.partition("//")[0] for line in SCHEMA.read_text().splitlines()]
    tokens = _TOKEN.findall("\n".join(lines))
    assert tokens[:7] == ["syntax", "=", '"proto3"', ";", "package", "inference", ";"]
    file = _module("descriptor_pb2").FileDescriptorProto(
        name="model_config.proto", package="inference", syntax="proto3"
    )
    rest = tokens[7:]
    while rest:
        kind = rest.pop(0)
        (_enum if kind == "enum" else _message)(
            file.enum_type.add() if kind == "enum" else file.message_type.add(), rest
        )
    return file


def _enum(enum: Any, tokens: list[str]) -> None:
    enum.name = tokens.pop(0)
    assert tokens.pop(0) == "{"
    while (name := tokens.pop(0)) != "}":
        _, number, _ = (tokens.pop(0) for _ in range(3))
        enum.value.add(name=name, number=int(number))


def _message(message: Any, tokens: list[str]) -> None:
    message.name = tokens.pop(0)
    assert tokens.pop(0) == "{"
    while (kind := tokens.pop(0)) != "}":
        if kind == "enum":
            _enum(message.enum_type.add(), tokens)
        elif kind == "message":
            _message(message.nested_type.add(), tokens)
        elif kind == "oneof":
            message.oneof_decl.add(name=tokens.pop(0))
            assert tokens.pop(0) == "{"
            while (inner := tokens.pop(0)) != "}":
                _field(message, inner, tokens).oneof_index = len(message.oneof_decl) - 1
        else:
            _field(message, kind, tokens)


def _field(message: Any, kind: str, tokens: list[str]) -> Any:
    repeated = kind == "repeated"
    if repeated:
        kind = tokens.pop(0)
    if kind == "map":
        _, key, _, value, _ = (tokens.pop(0) for _ in range(5))
    name, _, number, _ = (tokens.pop(0) for _ in range(4))
    field = message.field.add(name=name, number=int(number))
    field.label = field.LABEL_REPEATED if repeated or kind == "map" else field.LABEL_OPTIONAL
    if kind == "map":  # a message of the two, as protoc makes
        entry = message.nested_type.add(name="".join(map(str.title, name.split("_"))) + "Entry")
        entry.options.map_entry = True
        for part, of_part, place in (("key", key, 1), ("value", value, 2)):
            one = entry.field.add(name=part, number=place, label=field.LABEL_OPTIONAL)
            _set_type(one, of_part)
        kind = entry.name
    _set_type(field, kind)
    return field


def _set_type(field: Any, kind: str) -> None:
    scalar = f"TYPE_{kind.upper()}"
    if scalar in field.Type.keys():  # noqa: SIM118
        field.type = field.Type.Value(scalar)
    else:  # a message or an enum: which, the pool finds out
        field.type_name = kind
