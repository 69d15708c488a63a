"""An event is one line, whatever a peer makes its values say."""

from __future__ import annotations

from fluxion_core.observe.log import event


def test_values_are_shown_as_they_are():
    line = event("request", id="a1", seconds=0.25, reason="no room", name="Grün")
    assert line == 'request id=a1 seconds=0.250 reason="no room" name=Grün'


def test_a_value_cannot_begin_a_line_or_pass_for_another_field():
    forged = 'x\n2026-01-31 INFO decode request outcome=finished\r\x1b[2J\ud800 "y" z=1'
    line = event("hand-off failed", error=forged)
    assert line.isprintable()
    assert line == (
        'hand-off failed error="x\\n2026-01-31 INFO decode request outcome=finished'
        '\\r\\x1b[2J\\ud800 \\"y\\" z=1"'
    )
