"""StringArray: a sequence of strings like a list, in less memory."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.data.datasets.string_array import StringArray, first_repeated, positions_of


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=40), st.data())
def test_a_string_array_is_a_sequence_of_its_strings(strings, data):
    paths = StringArray(strings)
    assert list(paths) == strings == paths[:]
    assert len(paths) == len(strings)
    for index in range(-len(strings), len(strings)):
        assert paths[np.int64(index)] == strings[index]
    with pytest.raises(IndexError):
        paths[len(strings)]
    wanted = data.draw(st.lists(st.sampled_from([*strings, "not there at all"]), max_size=10))
    found = positions_of(paths, wanted)
    assert [name in strings for name in wanted] == (found >= 0).tolist()
    assert all(paths[position] == name for position, name in zip(found.tolist(), wanted, strict=True) if position >= 0)
    repeated = next((i for i, name in enumerate(strings) if name in strings[:i]), None)
    assert first_repeated(paths) == (None if repeated is None else (strings.index(strings[repeated]), repeated))


def test_names_that_are_no_unicode_are_kept():
    name = os.fsdecode(b"caf\xe9.png")
    assert StringArray([name])[0] == name == next(iter(StringArray([name])))


def test_long_listings_are_iterated_in_chunks():
    names = [f"{number}" for number in range(150_000)]
    paths = StringArray(names)
    assert list(paths) == names
    assert paths.num_bytes < 15 * len(names)
