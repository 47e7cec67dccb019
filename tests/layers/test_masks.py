"""Masks say True where a token may be attended to, and lie where their input lies."""

import pytest
import torch

from triglot.layers.masks import (
    check_mask,
    create_document_mask,
    create_look_ahead_mask,
    create_masks,
    create_padding_mask,
    real_tokens,
)


@pytest.fixture
def pairs():
    src, tgt = torch.randint(1, 23, (2, 7)), torch.randint(1, 29, (2, 5))
    src[0, 4:], tgt[1, 3:] = 0, 0
    return src, tgt


def test_masks_say_true_where_a_query_may_attend(pairs, check_fields):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    check_fields(masks)
    for row in range(2):
        for key in range(7):
            assert masks.src_mask[row, 0, 0, key] == masks.cross_mask[row, 0, 0, key] == (src[row, key] != 0)
        for query in range(5):
            for key in range(5):
                assert masks.tgt_mask[row, 0, query, key] == (tgt[row, key] != 0 and key <= query)


@pytest.mark.parametrize("window", [1, 3, 7, 99])
def test_a_window_leaves_the_last_of_what_may_be_attended_to(window):
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
    mask, of_documents = create_look_ahead_mask(7, window=window), create_document_mask(segments, window=window)
    for query in range(7):
        for key in range(7):
            assert mask[query, key] == (key <= query and query - key < window)
            same = segments[0, query] == segments[0, key] != 0
            assert of_documents[0, 0, query, key] == (mask[query, key] and same)


def test_another_token_can_be_the_padding(pairs):
    src, tgt = pairs
    assert create_padding_mask(src, 3).equal(create_padding_mask(src, pad_id=3))
    assert create_padding_mask(src, 3)[:, 0, 0].equal(src != 3)
    masks = create_masks(src, tgt, pad_id=3)
    assert masks.src_mask[:, 0, 0].equal(src != 3)
    assert masks.tgt_mask[:, 0, -1].equal(tgt != 3)


def test_masks_follow_the_device_of_their_input_or_go_where_they_are_sent(pairs):
    meta = [side.to("meta") for side in pairs]
    assert {mask.device.type for mask in create_masks(*meta)} == {"meta"}
    assert create_padding_mask(meta[0]).device.type == "meta"
    assert create_document_mask(meta[0]).device.type == "meta"
    assert {mask.device.type for mask in create_masks(*pairs, device="meta")} == {"meta"}
    assert create_padding_mask(pairs[0], device="meta").device.type == "meta"
    assert create_look_ahead_mask(5, device="meta").device.type == "meta"
    assert {mask.device.type for mask in create_masks(*pairs)} == {"cpu"}


def test_documents_of_a_packed_row_do_not_see_each_other():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0, 0]])
    mask = create_document_mask(segments)
    assert mask.shape == (2, 1, 7, 7)
    for row in range(2):
        for query in range(7):
            for key in range(7):
                same = segments[row, query] == segments[row, key] != 0
                assert mask[row, 0, query, key] == (same and key <= query)


def test_real_tokens_are_read_off_any_mask_that_tells_them(pairs):
    src, tgt = pairs
    masks = create_masks(src, tgt)
    assert real_tokens(masks.src_mask, 2, 7).equal(src != 0)
    assert real_tokens(masks.tgt_mask, 2, 5).equal(tgt != 0)
    assert real_tokens(None, 2, 5) is None
    assert real_tokens(create_look_ahead_mask(5), 2, 5) is None
    assert real_tokens(create_look_ahead_mask(5)[None], 2, 5) is None
    assert real_tokens(create_look_ahead_mask(5)[None, None], 2, 5).all()


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (2, 1, 1, 5), (2, 3, 5, 5)])
def test_shapes_that_can_be_meant_in_one_way_only_are_taken(shape):
    check_mask(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(5,), (2, 5, 5), (1, 1, 2, 5, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`mask` must be \[query, key\], \[1, query, key\] or of rank 4, but is \["):
        check_mask(torch.ones(shape, dtype=torch.bool))
