"""Methods and messages of the .proto files, from their comments."""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from generators.text import entry, paragraph

PROTOS = Path(__file__).parents[2] / "protos"
_PACKAGE = ".fluxion.v1."
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
"""Field numbers of a file's descriptor, as its comments are addressed."""

Comments = dict[tuple[int, ...], str]


@cache
def _file(name: str) -> tuple[FileDescriptorProto, Comments]:
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "descriptors"
        status = protoc.main(
            [
                *("protoc", f"-I{PROTOS}", f"-I{well_known}", "--include_source_info"),
                *(f"--descriptor_set_out={made}", f"fluxion_proto/v1/{name}"),
            ]
        )
        if status:
            raise SystemExit(f"protoc failed with status {status}")
        file = FileDescriptorSet.FromString(made.read_bytes()).file[0]
    comments = {
        tuple(place.path): f"{place.leading_comments} {place.trailing_comments}".strip()
        for place in file.source_code_info.location
    }
    return file, comments


def _type(field: FieldDescriptorProto) -> str:
    name = field.type_name.removeprefix(_PACKAGE) if field.type_name else ""
    kind = f"[{name}](#{name.lower()})" if name else field.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"### {message.name}\n\n"
    if about := comments.get(path):
        yield paragraph(about) + "\n\n"
    for number, field in enumerate(message.field):
        group = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            group = f"; one of `{message.oneof_decl[field.oneof_index].name}`"
        yield entry(field.name, _type(field) + group, comments.get((*path, 2, number), ""))
    yield "\n" if message.field else "Empty.\n\n"


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"### {enum.name}\n\n"
    if about := comments.get(path):
        yield paragraph(about) + "\n\n"
    for number, value in enumerate(enum.value):
        yield entry(value.name, str(value.number), comments.get((*path, 2, number), ""))
    yield "\n"


def _service(
    service: ServiceDescriptorProto, path: tuple[int, ...], comments: Comments
) -> Iterator[str]:
    for number, method in enumerate(service.method):
        question, answer = (
            f"[{name}](#{name.lower()})"
            for name in (
                method.input_type.removeprefix(_PACKAGE),
                method.output_type.removeprefix(_PACKAGE),
            )
        )
        stream = "a stream of " if method.server_streaming else ""
        about = f"{question} to {stream}{answer}"
        name = f"{service.name}.{method.name}"
        yield entry(name, about, comments.get((*path, 2, number), ""))


def _methods(name: str) -> str:
    file, comments = _file(name)
    return "".join(
        text
        for number, service in enumerate(file.service)
        for text in _service(service, (_SERVICE, number), comments)
    )


def _messages(name: str) -> str:
    file, comments = _file(name)
    messages = (
        text
        for number, message in enumerate(file.message_type)
        for text in _message(message, (_MESSAGE, number), comments)
    )
    enums = (
        text
        for number, enum in enumerate(file.enum_type)
        for text in _enum(enum, (_ENUM, number), comments)
    )
    return "".join([*messages, *enums]).rstrip() + "\n"


REGIONS: dict[str, Callable[[], str]] = {
    "methods": partial(_methods, "generate.proto"),
    "messages": partial(_messages, "generate.proto"),
}
