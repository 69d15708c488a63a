"""Settings of both nodes, from their models: name, default, choices, meaning."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fluxion_core.config.settings import NodeSettings
from generators.text import entry, paragraph
from services.decode.config import DecodeSettings
from services.prefill.config import PrefillNodeSettings


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if value in (None, "", ()):
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if name.endswith("_bytes"):
        for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value % factor == 0:
                return f"`{value // factor}{unit}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{one}`" for one in value)
    return f"`{value}`"


def _choices(annotation: object) -> str:
    """Of a Literal; empty for anything else."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(_choices, get_args(annotation))), "")
    if get_origin(annotation) is not Literal:
        return ""
    return "one of " + ", ".join(f"`{choice}`" for choice in get_args(annotation)) + "; "


def _section(model: type[BaseModel], name: str) -> str:
    """One section, then those within it."""
    parts = [f"### [{name}]\n", paragraph(model.__doc__ or "") + "\n"]
    entries, inner = [], []
    for key, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append(_section(kind, f"{name}.{key}"))
        else:
            default = _default(key, field)
            about = f"{_choices(field.annotation)}default {default}".replace("default not", "not")
            entries.append(entry(f"{name}.{key}", about, field.description or ""))
    return "\n".join([*parts, "".join(entries), *inner])


def _sections(settings: type[NodeSettings], without: type[BaseModel] | None) -> str:
    """All sections of a node that another model does not have as well."""
    shared = set() if without is None else set(without.model_fields)
    made = []
    for name, field in settings.model_fields.items():
        assert isinstance(field.annotation, type), "a root model has sections alone"
        if name not in shared:
            made.append(_section(field.annotation, name))
    return "\n".join(made)


REGIONS = {
    "settings of both nodes": lambda: _sections(NodeSettings, None),
    "settings of decode nodes": lambda: _sections(DecodeSettings, NodeSettings),
    "settings of prefill nodes": lambda: _sections(PrefillNodeSettings, NodeSettings),
}
