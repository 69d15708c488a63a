"""Rotary settings of config.json, which has had three places for them.

Today's is `rope_parameters`; older files have `rope_theta` and `rope_scaling` beside it, and people
add `rope_scaling` from a model's card to a file of the newer kind. It counts then, as in
transformers; two places that contradict each other are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.models.config import LinearScaling, Llama3Scaling, RopeConfig
from fluxion_core.models.config_fields import ConfigFields
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_DEFAULT_THETA = 10_000.0
_LENGTH = "original_max_position_embeddings"
# Entries that count, of all kinds of scaling and of one.
_ANY_KIND = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
_OWN = {
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor", _LENGTH)),
}


def read_rope(raw: Mapping[str, object], path: Path) -> RopeConfig:
    """Rotary settings of a config.

    Raises:
        UnsupportedModelError: another kind of scaling, or not all channels are rotated.
        ModelFileError: an entry is missing or wrong, or two contradict each other.
    """
    scaling, parameters = (_object(raw, name, path) for name in ("rope_scaling", "rope_parameters"))
    chosen = scaling or parameters
    _check_put_aside(scaling, parameters, path)
    fields = ConfigFields(chosen, path)
    share = _agreed("partial_rotary_factor", [scaling, parameters, raw], path)
    if share not in (None, 1):
        raise UnsupportedModelError(f"{path}: rotary embedding over a part of the channels")
    said = _agreed("rope_theta", [chosen, raw], path)
    base = (
        _DEFAULT_THETA
        if said is None
        else ConfigFields({"rope_theta": said}, path).number("rope_theta")
    )
    if base != ConfigFields(parameters, path).number("rope_theta", base):
        raise ModelFileError(
            f"{path}: rope_theta of rope_parameters does not count beside rope_scaling, and {base} "
            f"would; move the entries of rope_scaling into rope_parameters"
        )
    kind, older = chosen.get("rope_type"), chosen.get("type")
    if None not in (kind, older) and kind != older:
        raise ModelFileError(f"{path}: rotary scaling is both {kind!r} and {older!r}; keep one")
    name = kind or older or "default"
    if unread := sorted(set(chosen) - _ANY_KIND - _OWN.get(str(name), frozenset())):
        _log.warning(event("rotary entries without effect", file=path, entries=", ".join(unread)))
    match name:
        case "default":
            return RopeConfig(base)
        case "linear":
            return RopeConfig(base, LinearScaling(fields.number("factor")))
        case "llama3":
            length = _agreed(_LENGTH, [chosen, raw], path)
            return RopeConfig(
                base,
                Llama3Scaling(
                    factor=fields.number("factor"),
                    low_freq_factor=fields.number("low_freq_factor"),
                    high_freq_factor=fields.number("high_freq_factor"),
                    original_context_tokens=ConfigFields({_LENGTH: length}, path).integer(_LENGTH),
                ),
            )
        case other:
            raise UnsupportedModelError(
                f"{path}: rotary scaling {other!r}; supported: default, linear, llama3"
            )


def _object(raw: Mapping[str, object], name: str, path: Path) -> Mapping[str, object]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: {name} is {value!r:.60}; must be an object")
    if any(isinstance(entry, dict) for entry in value.values()):
        raise UnsupportedModelError(f"{path}: {name} by kinds of layers is not supported")
    return value


def _check_put_aside(
    scaling: Mapping[str, object], parameters: Mapping[str, object], path: Path
) -> None:
    """`rope_scaling` may say more than `rope_parameters` does, but nothing else."""
    for name, value in parameters.items():
        is_plain = name in ("rope_type", "type") and value == "default"
        if scaling and not is_plain and scaling.get(name, value) != value:
            raise ModelFileError(
                f"{path}: {name} is {value!r:.60} in rope_parameters and {scaling[name]!r:.60} in "
                f"rope_scaling; keep one"
            )


def _agreed(name: str, places: list[Mapping[str, object]], path: Path) -> object:
    """What all places that say something say."""
    said = [place[name] for place in places if place.get(name) is not None]
    if any(value != said[0] for value in said):
        raise ModelFileError(
            f"{path}: {name} is {said[0]!r:.60} in one place and "
            f"{next(value for value in said if value != said[0])!r:.60} in another; keep one"
        )
    return said[0] if said else None
