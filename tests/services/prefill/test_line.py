"""The line of prompts by hand: chunks of 4,000 tokens, and a second for each 1,000 tokens."""

from __future__ import annotations

import pytest

from fluxion_core.errors import CapacityError
from fluxion_core.generation.sampling import SamplingParams
from services.prefill.line import LineLimits, PromptLine, PromptWait
from services.prefill.prompt import Prompt

CHUNK_TOKENS = 4_000
LIMITS = {
    "chunk_tokens": CHUNK_TOKENS,
    "max_running": 8,
    "max_waiting": 64,
    "running_kv_bytes": 1_000_000,
    "outgoing_bytes": 2 * CHUNK_TOKENS,
}


def line_of(**limits: int) -> PromptLine:
    """A line whose tokens have a byte of KV."""
    return PromptLine(lambda tokens: tokens / 1_000, 1, LineLimits(**(LIMITS | limits)))


class Receiver:
    """A prompt, and how many bytes of its KV wait to be taken."""

    def __init__(self, num_tokens: int, arrival: float = 0.0) -> None:
        self.outgoing_bytes = 0
        self.prompt = Prompt(
            request_id="r",
            token_ids=[0] * num_tokens,
            kv_from_token=0,
            sampling=SamplingParams(),
            on_frame=lambda _: None,
            on_end=lambda _: None,
            outgoing_bytes=lambda: self.outgoing_bytes,
            submitted=arrival,
        )


def waiting(line: PromptLine, *receivers: Receiver) -> None:
    for receiver in receivers:
        line.add(receiver.prompt)


def computed(line: PromptLine, prompt: Prompt) -> int:
    """Compute a chunk, and end the prompt with its last; the chunk's tokens."""
    tokens = min(CHUNK_TOKENS, len(prompt.token_ids) - prompt.num_computed)
    prompt.num_computed += tokens
    if prompt.num_computed == len(prompt.token_ids):
        line.end(prompt, is_computed=True)
    return tokens


def ends_of(*receivers: Receiver) -> list[float]:
    """When each prompt is computed, in seconds; they are given in the order that they come."""
    line, coming, now = line_of(), [receiver.prompt for receiver in receivers], 0.0
    ends: dict[Prompt, float] = {}
    while len(ends) < len(receivers):
        while coming and coming[0].submitted <= now:
            line.add(coming.pop(0))
        if (prompt := line.next()) is None:
            now = coming[0].submitted
            continue
        now += computed(line, prompt) / 1_000
        if prompt.num_computed == len(prompt.token_ids):
            ends[prompt] = now
    return [ends[receiver.prompt] for receiver in receivers]


def test_short_prompts_go_at_the_next_chunks_end_and_long_ones_take_no_longer_together():
    longs = [Receiver(128_000) for _ in range(4)]
    early, late = Receiver(1_000, arrival=1), Receiver(1_000, arrival=400)
    # By hand: the first chunk ends at 4, then the early one takes a second. The fourth long one
    # begins at 1 + 3 * 128 = 385; its fourth chunk ends at 401, and the late one takes a second.
    assert ends_of(*longs, early, late) == [129, 257, 385, 514, 5, 402]


def test_prompts_of_one_length_go_one_after_the_other():
    # By hand: the second comes after the first chunk; turns in a round would end at 23 and 24.
    assert ends_of(Receiver(12_000), Receiver(12_000, arrival=1)) == [12, 24]


def test_what_is_shorter_goes_first_and_what_is_longer_is_not_forgotten():
    # By hand: deadlines are 128, 64 + 1 and 32 + 2. The longest one's first chunk ends at 4, then
    # the shortest one takes 2 seconds and the other 4; the rest of the longest follows.
    prompts = Receiver(8_000), Receiver(4_000, arrival=1), Receiver(2_000, arrival=2)
    assert ends_of(*prompts) == [14, 10, 6]


def test_short_prompts_that_fill_all_time_keep_a_long_one_waiting_for_sixteen_of_its_own_times():
    # By hand: the long one's deadline is 16 * 16 = 256, a short one's 16 after it came. So the one
    # that comes at 239 goes before the long one, and the one that comes at 240 does not.
    long, shorts = Receiver(16_000), [Receiver(1_000, arrival=second) for second in range(300)]
    ends = ends_of(long, *shorts)
    assert ends[0] == 256
    assert ends[1:241] == list(range(1, 241))
    assert ends[241] == 257


def test_a_prompt_whose_kv_is_not_taken_gives_way_and_has_its_turn_again():
    line, first, second = line_of(), Receiver(12_000), Receiver(12_000)
    waiting(line, first, second)
    assert line.next() is first.prompt
    computed(line, first.prompt)
    # One more chunk's KV has no room beside it.
    first.outgoing_bytes = CHUNK_TOKENS + 1
    assert line.next() is second.prompt
    load = line.load()
    assert (load.running_prompts, load.paused_prompts, load.waiting_prompts) == (1, 1, 0)
    computed(line, second.prompt)
    first.outgoing_bytes = CHUNK_TOKENS
    assert line.next() is first.prompt
    first.outgoing_bytes = second.outgoing_bytes = 2 * CHUNK_TOKENS
    assert line.next() is None
    assert line.load().pending_tokens == 16_000


def test_a_prompt_begins_with_its_first_turn_and_not_before():
    line, long, other = line_of(), Receiver(12_000), Receiver(12_000)
    waiting(line, long, other)
    assert line.next() is long.prompt
    load = line.load()
    assert (load.running_prompts, load.paused_prompts, load.waiting_prompts) == (1, 0, 1)


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_begun_prompt_that_is_given_up_ends_at_once_and_gives_its_memory_back(has_failed: bool):
    line = line_of(running_kv_bytes=16_000)
    long, short, other = Receiver(14_000), Receiver(2_000), Receiver(14_000)
    waiting(line, long)
    assert line.next() is long.prompt
    waiting(line, short, other)
    assert line.next() is short.prompt
    if has_failed:
        line.end(long.prompt, is_computed=False)
    else:
        # It has gone only when its end has had its turn, before all others'.
        assert not line.cancel(long.prompt)
        assert line.next() is long.prompt
        line.end(long.prompt, is_computed=False)
    computed(line, short.prompt)
    assert line.next() is other.prompt
    computed(line, other.prompt)
    assert not line.cancel(other.prompt)
    line.end(other.prompt, is_computed=False)
    load = line.load()
    assert (load.running_prompts, load.waiting_prompts, load.pending_tokens) == (0, 0, 0)


def test_a_prompt_cancelled_while_it_waits_is_gone():
    line, first, second = line_of(), Receiver(4_000), Receiver(4_000)
    waiting(line, first, second)
    assert line.cancel(first.prompt)
    assert line.next() is second.prompt
    assert line.load().pending_tokens == 4_000


def test_the_largest_prompt_leaves_room_for_short_ones():
    line = line_of(running_kv_bytes=16_000)
    longs = [Receiver(40_000), Receiver(40_000)]
    shorts = [Receiver(1_500, arrival=1), Receiver(500, arrival=2), Receiver(400, arrival=7)]
    waiting(line, *longs)
    assert line.next() is longs[0].prompt
    computed(line, longs[0].prompt)
    # By hand: of 16,000 bytes the long one counts as 14,000, and both short ones have the rest.
    waiting(line, *shorts)
    assert line.next() is shorts[1].prompt
    shorts[1].outgoing_bytes = 2 * CHUNK_TOKENS
    assert line.next() is shorts[2].prompt
    # The third is next, whose deadline is before the first's, and nothing is left for the first.
    shorts[2].outgoing_bytes = 2 * CHUNK_TOKENS
    assert line.next() is longs[0].prompt
    assert line.load().waiting_prompts == 2
    shorts[1].outgoing_bytes = 0
    computed(line, shorts[1].prompt)
    shorts[2].outgoing_bytes = 0
    computed(line, shorts[2].prompt)
    assert line.next() is shorts[0].prompt


def test_nobody_begins_behind_the_first_that_has_no_room():
    line = line_of(running_kv_bytes=16_000)
    paused, large, small = Receiver(8_000), Receiver(12_000), Receiver(1_000, arrival=300)
    waiting(line, paused)
    assert line.next() is paused.prompt
    paused.outgoing_bytes = 2 * CHUNK_TOKENS
    # By hand: deadlines are 192 and 316.
    waiting(line, large, small)
    assert line.next() is None
    paused.outgoing_bytes = 0
    while paused.prompt.num_computed < 8_000:
        assert line.next() is paused.prompt
        computed(line, paused.prompt)
    # What is computed and not taken counts: 4,001 bytes beside the large one's 12,000.
    paused.outgoing_bytes = 4_001
    assert line.next() is None
    paused.outgoing_bytes = 4_000
    assert line.next() is large.prompt


def test_what_was_not_taken_counts_for_nobody_who_has_gone():
    line = line_of(running_kv_bytes=16_000)
    gone, other = Receiver(4_000), Receiver(14_000)
    waiting(line, gone)
    assert line.next() is gone.prompt
    # While its last chunk is computed.
    assert not line.cancel(gone.prompt)
    gone.outgoing_bytes = 4_000
    line.end(gone.prompt, is_computed=True)
    waiting(line, other, third := Receiver(2_000, arrival=300))
    assert line.next() is other.prompt
    other.outgoing_bytes = 2 * CHUNK_TOKENS
    assert line.next() is third.prompt


def test_places_bound_how_many_have_begun_those_that_pause_not_counted():
    line = line_of(max_running=2)
    prompts = [Receiver(tokens) for tokens in (16_000, 8_000, 4_000, 2_000)]
    for receiver in prompts[:2]:
        waiting(line, receiver)
        assert line.next() is receiver.prompt
    waiting(line, prompts[2])
    assert line.next() is prompts[1].prompt
    prompts[0].outgoing_bytes = 2 * CHUNK_TOKENS
    assert line.next() is prompts[2].prompt


def test_as_many_may_wait_as_there_are_places_and_no_more():
    line = line_of(max_running=2, max_waiting=1)
    # Not begun: two for the free places, one that waits.
    waiting(line, *(Receiver(4_000) for _ in range(3)))
    with pytest.raises(CapacityError, match="prefill queue"):
        line.add(Receiver(4_000).prompt)
    assert line.next() is not None
    with pytest.raises(CapacityError):
        waiting(line, *(Receiver(4_000) for _ in range(2)))


def test_a_prompt_that_comes_waits_for_earlier_deadlines_and_for_half_a_chunk_of_a_later_one():
    line, long, short = line_of(), Receiver(128_000), Receiver(2_000, arrival=10)
    waiting(line, long, Receiver(128_000))
    assert line.next() is long.prompt
    computed(line, long.prompt)
    waiting(line, short)
    # By hand: deadlines are 2,048 and 42. One of 3,000 that comes at 11 has 59, and waits for the
    # short one; a short one that comes at 9 has 41, and waits for nobody but half a chunk, 2 s.
    assert line.next() is short.prompt
    assert line.wait(3_000, now=11) == PromptWait(2_000, 2.0)
    assert line.wait(2_000, now=9) == PromptWait(0, 1.0)
    # It has gone when it is computed; then a chunk of the long one is under way.
    computed(line, short.prompt)
    assert line.next() is long.prompt
    assert line.wait(3_000, now=11) == PromptWait(0, 2.0)
    # One of 128,000 waits for the rest of both; so does a short one once they have waited.
    assert line.wait(128_000, now=11) == PromptWait(252_000, 252.0)
    assert line.wait(1_000, now=2_032) == PromptWait(252_000, 252.0)
    line.cancel(long.prompt)
    assert line.wait(128_000, now=11) == PromptWait(128_000, 128.0)
