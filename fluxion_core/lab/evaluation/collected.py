"""Scores of answers that collect: records of a JSON array, numbers of a line, a total. 0 to 1.

What is right in a wrong or unfinished answer counts; what follows the answer does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_DECODER = json.JSONDecoder(strict=False)

_FIELD = re.compile(r'"(\w+)"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?=\s*[,}]))')

_NUMBER = re.compile(r"\d+")

_TOTAL = re.compile(r"total\D{0,20}?(\d+)(?=(\D)|$)", re.IGNORECASE)

Triple = tuple[str, str, str]
"""Name of a record, a field of it, and its value."""


def records_iou(answer: str, references: Sequence[str]) -> float:
    """Fields that both have, as a share of those that one of them has.

    A field counts if its record's name, its own name and its value are the same, whatever their
    case. The name is a field too.

    Args:
        answer: a text with a JSON array of objects, or an object; it may be cut anywhere.
        references: each the JSON text of one record, with a field "name".
    """
    wanted = {triple for text in references for triple in _triples(json.loads(text))}
    given = {triple for record in records_in(answer)[0] for triple in _triples(record)}
    return len(given & wanted) / len(given | wanted)


def records_in(answer: str) -> tuple[list[dict[str, object]], bool]:
    """Objects of the first JSON array or object of a text, and whether it is closed.

    The whole fields of an object that is cut or damaged are kept; it is the last one.
    """
    start = re.search(r"[\[{]", answer)
    if start is None:
        return [], False
    is_array = start.group() == "["
    place = start.end() if is_array else start.start()
    records: list[dict[str, object]] = []
    while True:
        place = _skip(answer, place, ", \n\r\t")
        if not answer.startswith("{", place):
            return records, is_array and answer.startswith("]", place)
        try:
            record, place = _DECODER.raw_decode(answer, place)
        except ValueError:
            return [*records, _fields_of(answer[place:])], False
        records.append(record)
        if not is_array:
            return records, True


def numbers_iou(answer: str, references: Sequence[str]) -> float:
    """Numbers that both have, as a share of those that one of them has; each counts once."""
    given, wanted = set(_NUMBER.findall(answer)), set(references)
    return len(given & wanted) / len(given | wanted)


def total_nearness(answer: str, reference: str) -> float:
    """1 for the right total, less by twice its relative error, and never below 0.

    Args:
        answer: a text in which a number follows the word "total".
        reference: the right number, above 0.
    """
    found = _TOTAL.search(answer)
    if found is None:
        return 0.0
    wanted = int(reference)
    return max(0.0, 1 - 2 * abs(int(found.group(1)) - wanted) / wanted)


def has_total(answer: str) -> bool:
    """Whether a total is there that what follows cannot make longer."""
    found = _TOTAL.search(answer)
    return found is not None and found.group(2) is not None


def _triples(record: dict[str, object]) -> set[Triple]:
    values = {str(field).casefold(): str(value).casefold() for field, value in record.items()}
    return {(values.get("name", ""), field, value) for field, value in values.items()}


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _fields_of(text: str) -> dict[str, object]:
    """Whole fields of an object's text, up to the next object."""
    own = text[: text.find("{", 1)] if "{" in text[1:] else text
    return {name: _value(text) for name, text in _FIELD.findall(own)}


def _value(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        # An escape that JSON does not have.
        return text.strip('"')
