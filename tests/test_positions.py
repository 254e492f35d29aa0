"""Absolute positions: pads, caches, and what the names mean."""

from __future__ import annotations

import pytest
import torch

from steerlens.core import Positions, Record, check_where

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def begin(shape, past=0, mask=None, tracker=None, **options):
    tracker = tracker or Positions()
    tracker.begin(shape, past, mask, device="cpu", **options)
    return tracker


def chosen(tracker, where):
    selection = tracker.select(where)
    columns = torch.zeros(tracker.batch, tracker.length, dtype=torch.bool)
    if selection is not None:
        if isinstance(selection, slice):
            columns[:, selection] = True
        else:
            columns = selection
    return columns.int().tolist()


def test_names_leave_position_zero_alone():
    tracker = begin((1, 4))
    assert chosen(tracker, "last") == [[0, 0, 0, 1]]
    assert chosen(tracker, "all") == [[0, 1, 1, 1]]
    assert chosen(tracker, "prompt") == [[0, 1, 1, 1]]
    assert chosen(tracker, "generated") == [[0, 0, 0, 0]]
    assert chosen(tracker, slice(0, None)) == [[1, 1, 1, 1]]
    assert chosen(begin((1, 1)), "last") == [[0]]


def test_last_prompt_is_one_token_of_a_sequence():
    tracker = begin((1, 4))
    assert chosen(tracker, "last_prompt") == [[0, 0, 0, 1]]
    assert chosen(begin((1, 1), past=4, tracker=tracker), "last_prompt") == [[0]]
    without_cache = begin((1, 6), end=4, tracker=begin((1, 4), end=4))
    assert chosen(without_cache, "last_prompt") == [[0, 0, 0, 1, 0, 0]]
    assert chosen(begin((2, 5), mask=LEFT), "last_prompt") == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert chosen(begin((2, 5), mask=RIGHT), "last_prompt") == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert chosen(begin((1, 1)), "last_prompt") == [[0]]


def test_padded_rows_count_from_their_first_real_token():
    left, right = begin((2, 5), mask=LEFT), begin((2, 5), mask=RIGHT)
    assert left.table().tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert chosen(left, "last") == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert chosen(right, "last") == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert chosen(left, "all") == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert chosen(right, slice(-2, None)) == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert chosen(left, lambda position: position % 2 == 0) == [[0, 0, 1, 0, 1], [1, 0, 1, 0, 1]]


def test_a_kv_cache_does_not_shift_positions():
    cached = begin((1, 4))
    begin((1, 1), past=4, tracker=cached)
    plain = begin((1, 4), end=4)
    begin((1, 5), end=4, tracker=plain)
    for where, old, new in (("last", [0, 0, 0, 1], 1), ("generated", [0] * 4, 1), ("prompt", [0, 1, 1, 1], 0)):
        assert chosen(cached, where) == [[new]]
        assert chosen(plain, where) == [[*old, new]]


def test_a_prompt_as_long_as_a_cache_is_not_taken_for_a_continuation():
    tracker = begin((1, 4))
    assert begin((1, 5), tracker=tracker).prompt == 5


def test_decoding_keeps_each_rows_own_prompt():
    tracker = begin((2, 5), mask=LEFT)
    mask = torch.cat([LEFT, torch.ones(2, 1, dtype=torch.long)], dim=1)
    begin((2, 1), past=5, mask=mask, tracker=tracker)
    assert tracker.table().tolist() == [[3], [5]]
    assert chosen(tracker, "last") == [[1], [1]]
    assert chosen(tracker, slice(4, None)) == [[0], [1]]


def test_a_mask_is_read_at_absolute_positions():
    tracker = begin((2, 5), mask=LEFT)
    assert chosen(tracker, torch.tensor([False, True, True])) == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]


def test_by_hand_a_pass_of_several_tokens_continues_the_prompt():
    tracker = begin((1, 4))
    begin((1, 3), past=4, tracker=tracker)
    assert tracker.prompt == 7
    assert chosen(tracker, "last") == [[0, 0, 1]]
    begin((1, 1), past=7, tracker=tracker)
    assert chosen(tracker, "generated") == [[1]]
    begin((1, 2), past=8, tracker=tracker)
    assert chosen(tracker, "prompt") == [[1, 1]]
    late = begin((1, 1), past=5)
    assert chosen(late, "generated") == [[1]]


def test_a_prompt_that_comes_in_pieces_ends_where_it_is_known_to_end():
    tracker = begin((2, 3), mask=LEFT[:, :3], end=5)
    assert chosen(tracker, "last") == [[0, 0, 0], [0, 0, 0]]
    assert chosen(tracker, "prompt") == [[0, 0, 0], [0, 1, 1]]
    begin((2, 2), past=3, mask=LEFT, end=5, tracker=tracker)
    assert chosen(tracker, "last") == [[0, 1], [0, 1]]
    assert tracker.prompt.tolist() == [3, 5]


def test_lengths_say_where_each_rows_prompt_ends():
    for mask, columns in ((None, [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]), (RIGHT, [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])):
        assert chosen(begin((2, 5), mask=mask, lengths=[2, 4]), "last") == columns
    assert chosen(begin((2, 5), mask=LEFT, lengths=[2, 4]), "last") == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert chosen(begin((1, 5), lengths=2), "generated") == [[0, 0, 1, 1, 1]]
    assert begin((2, 5), lengths=[2, 4]).steps().tolist() == [[-1, 0, 1, 2, 3], [-3, -2, -1, 0, 1]]
    with pytest.raises(ValueError, match="given 3 prompt lengths for a batch of 2 rows"):
        begin((2, 5), lengths=[1, 2, 3])


@pytest.mark.parametrize("where", ["first", slice(0, 9, 2), torch.ones(3), torch.ones(1, 2, 3, dtype=torch.bool)])
def test_nonsense_is_refused(where):
    with pytest.raises(ValueError, match="where"):
        check_where(where)
    with pytest.raises(TypeError, match="where"):
        check_where(3)


def test_a_record_joins_passes_that_selected_nothing():
    """A signal with a shape of its own, of which the first pass knows batch and position only."""
    record = Record()
    pieces = [(0, 0, torch.full((1, 3), torch.nan)), (3, 0, torch.ones(1, 1, 4))]
    record.show({"pieces": {"blocks.0.hook_steer_weights": pieces}, "moves": [], "length": 4})
    joined = record["blocks.0.hook_steer_weights"]
    assert joined.shape == (1, 4, 4)
    assert joined[0, :3].isnan().all()
    assert joined[0, 3].tolist() == [1.0] * 4
