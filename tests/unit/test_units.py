"""Sizes and durations, read from people and written for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors, units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10M", 10 * 1024**2),
        ("10 MiB", 10 * 1024**2),
        ("10mb", 10 * 1024**2),
        ("1.5G", 1536 * 1024**2),
        (" 2 t ", 2 * 1024**4),
        ("1KiB", 1024),
        ("3P", 3 * 1024**5),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.", "1x", "1e3", "1_000", "10 10", "٣", "1" * 19])
def test_what_is_no_size_is_a_usage_error_that_shows_it(text: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        units.parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (64 * 1024, "64.0 KiB"),
        (1280 * 1024**2, "1.25 GiB"),
        (300 * 1024**2, "300 MiB"),
        (5000 * 1024**5, "5000 PiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, 2**60))
def test_a_written_size_reads_back_to_three_digits(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0049, "4.9 ms"), (1.25, "1.25 s"), (119.99, "119.99 s"), (200, "3 min 20 s")]
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@given(st.integers(0, 2**63), st.integers(1, 2**40))
def test_rounding_finds_the_nearest_multiples(value: int, unit: int) -> None:
    down, up = units.round_down(value, unit), units.round_up(value, unit)
    assert down % unit == up % unit == 0
    assert down <= value <= up
    assert up - down in (0, unit)
