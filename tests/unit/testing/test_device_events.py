"""The timeline that bench_overlap prints of a device."""

import pytest

from moetrain.testing.device_events import Event, describe

pytestmark = pytest.mark.unit


def test_lines_tell_when_where_and_what_stood_still_before():
    events = [Event(100.0, 50.0, 7, "up"), Event(110.0, 2.0, 9, "flag"), Event(170.0, 30.0, 7, "down")]
    events.append(Event(175.0, 20.0, 9, "copy"))
    assert [" ".join(line.split()) for line in describe(events)] == [
        "0 us + 50 stream 7 up",
        "70 us + 30 stream 7 down (after 20 idle)",
        "75 us + 20 stream 9 copy (after 63 idle)",
        "shorter ones: 2 us together",
    ]
