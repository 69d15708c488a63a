"""Messages become events, figures and a whole answer; nothing that a message says is left out."""

from __future__ import annotations

from dataclasses import fields

import pytest

from fluxion_core.client import Delta, Finish, KvReads, ModelInfo, NodeLoad, Progress, Usage
from fluxion_core.client.answers import AnswerReader, model_info_of, usage_of
from fluxion_core.errors import StreamTruncatedError
from fluxion_proto.v1 import generate_pb2
from tests.fluxion_core.client.conftest import END, PROGRESS, delta


@pytest.mark.parametrize(
    ("kind", "message", "others"),
    [
        (Usage, generate_pb2.Usage, {}),
        (KvReads, generate_pb2.KvReads, {}),
        (NodeLoad, generate_pb2.GetLoadResponse, {}),
        # Two fields of the message are one here: levels and what they mean.
        (
            ModelInfo,
            generate_pb2.GetModelInfoResponse,
            {"levels": {"quality_levels", "level_policies"}},
        ),
    ],
)
def test_every_figure_of_a_node_has_its_field(kind: type, message, others: dict[str, set[str]]):
    names = {field.name for field in fields(kind)}
    expected = (names - set(others)) | {name for both in others.values() for name in both}
    assert {field.name for field in message.DESCRIPTOR.fields} == expected


def test_an_answer_is_read_with_the_times_of_its_tokens():
    # By hand: begun at 10 s, tokens at 12, 13 and 15 s, the end at 16 s.
    now = iter((10.0, 12.0, 13.0, 15.0, 16.0))
    reader = AnswerReader(lambda: next(now))
    said = [PROGRESS, delta("The", 5), delta("", 6), delta(" sky", 7), END]
    events = [event for message in said for event in reader.take(message)]
    assert events[:4] == [
        Progress("prefill", 7, 3),
        Delta("The", (5,)),
        Delta("", (6,)),
        Delta(" sky", (7,)),
    ]
    assert isinstance(events[4], Finish)
    answer = reader.generation()
    assert (answer.request_id, answer.text, answer.token_ids) == ("r", "The sky", (5, 6, 7))
    assert (answer.finish_reason, answer.usage.generated_tokens) == ("stop", 1)
    assert (answer.first_token_seconds, answer.total_seconds) == (2.0, 6.0)
    assert answer.seconds_per_token == 1.5


def test_an_answer_without_its_end_is_none():
    reader = AnswerReader()
    reader.take(delta("The", 5))
    with pytest.raises(StreamTruncatedError, match="may be cut short"):
        reader.generation()


def test_figures_are_values_that_do_not_change():
    usage = usage_of(
        generate_pb2.Usage(
            prompt_tokens=7, kv_reads=generate_pb2.KvReads(groups_by_block_size=[1, 2, 3, 4])
        )
    )
    assert (usage.prompt_tokens, usage.kv_reads.groups_by_block_size) == (7, (1, 2, 3, 4))
    assert hash(usage) == hash(usage)
    assert usage.kv_reads.resident_share == 0
    reads = generate_pb2.KvReads(attended_bytes_per_token=8, resident_bytes_per_token=6)
    assert usage_of(generate_pb2.Usage(kv_reads=reads)).kv_reads.resident_share == 0.75
    level = generate_pb2.LevelPolicy(level=generate_pb2.QUALITY_LEVEL_FAST, policy="exact")
    info = model_info_of(generate_pb2.GetModelInfoResponse(level_policies=[level]))
    assert info.levels == {"fast": "exact"}


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress("queued", 0, 0), "the node reads the request"),
        (Progress("queued", 6959, 0), "6,959 tokens wait for room, or for a prefill node"),
        (Progress("prefill", 6959, 1234), "prefill 1,234 of 6,959 tokens"),
    ],
)
def test_how_far_a_prompt_is_in_words(progress: Progress, text: str):
    assert str(progress) == text
