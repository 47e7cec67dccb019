"""What holds for batches of pairs: shifted before they are padded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.data.batch import IGNORED, num_targets, padded, pair_batch

ROWS = st.lists(st.lists(st.integers(3, 97), max_size=13), min_size=1, max_size=7)


@settings(deadline=None, max_examples=25)
@given(rows=ROWS)
def test_padded_rows_are_what_pytorch_makes_of_them(rows):
    expected = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True)
    assert torch.equal(padded(rows), expected)


@settings(deadline=None, max_examples=25)
@given(rows=ROWS)
def test_inputs_begin_with_bos_and_outputs_end_with_eos_in_front_of_the_padding(rows):
    batch = pair_batch([[1, *row, 2] for row in rows], rows)
    for number, row in enumerate(rows):
        assert batch.src[number].tolist()[: len(row) + 2] == [1, *row, 2]
        assert batch.tgt_in[number, : len(row) + 1].tolist() == [1, *row]
        assert batch.tgt_out[number, : len(row) + 1].tolist() == [*row, 2]
        assert not batch.tgt_in[number, len(row) + 1 :].any()
        assert (batch.tgt_out[number, len(row) + 1 :] == IGNORED).all()
    assert num_targets(batch) == sum(map(len, rows)) + len(rows)
