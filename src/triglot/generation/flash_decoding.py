"""Attention of one token of each text on a GPU, as one kernel: Flash-Decoding (Dao et al. 2023) in Triton.

A text's keys are read up to its own end and no further, SPLIT of them by one program, which begins at the same places
whatever the text's length, room or company are: neither changes its bits.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64
"""Keys that a program multiplies at a time."""
SPLIT = 256
"""Keys that a program reads, one block after another."""
LEAST_ROWS = 16
"""Queries that a tensor core multiplies at a time: those of one head of keys, filled up."""
EVERYTHING = 2**30
"""Stands for no window."""
NOTHING = tl.constexpr(-1e30)
"""The score of what is hidden."""

Heads = Float[Tensor, "rows some head_dim"]
Held = Float[Tensor, "texts kv_heads capacity head_dim"]


def attend_to_held(
    query: Heads,
    key: Heads,
    value: Heads,
    keys: Held,
    values: Held,
    ends: Int[Tensor, " rows"],
    scale: float,
    window: int | None = None,
) -> Heads:
    """softmax(q Kᵀ · scale) V over what stands before each row's end and its own key and value, which join it there.

    The last two axes of the first three are contiguous; with a `window` the last so many keys are all that counts.
    Rows behind those of which something is held get zeros.
    """
    texts, kv_heads, capacity, head_dim = keys.shape
    rows = len(query)
    groups, parts = query.size(1) // kv_heads, triton.cdiv(capacity, SPLIT)
    padded = max(LEAST_ROWS, triton.next_power_of_2(groups))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partial = output.new_empty(rows, query.size(1), parts, head_dim + 2, dtype=torch.float32)
    _read_parts[(rows, kv_heads, parts)](
        query,
        key,
        value,
        keys,
        values,
        ends,
        output,
        partial,
        texts,
        EVERYTHING if window is None else window,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        capacity,
        SCALE=scale,
        HEADS=kv_heads,
        GROUP=groups,
        ROWS=padded,
        WIDTH=head_dim,
        FILLED=max(16, triton.next_power_of_2(head_dim)),
        PARTS=parts,
        BLOCK=BLOCK,
        SPLIT=SPLIT,
        num_warps=4,
        num_stages=3 if head_dim * query.element_size() <= 256 else 2,  # as much as shared memory holds
    )
    if parts > 1:
        _join_parts[(texts, query.size(1))](
            partial,
            ends,
            output,
            HEADS=query.size(1),
            WIDTH=head_dim,
            FILLED=max(16, triton.next_power_of_2(head_dim)),
            PARTS=parts,
            SPLIT=SPLIT,
            num_warps=1,
        )
    return output


@triton.jit
@no_type_check
def _read_parts(
    query,
    key,
    value,
    keys,
    values,
    ends,
    output,
    partial,
    texts,
    window,
    query_row,
    key_row,
    value_row,
    capacity,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FILLED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    which, d, n = tl.arange(0, ROWS), tl.arange(0, FILLED), tl.arange(0, BLOCK)
    of_query = head * GROUP + which
    of_output = row * HEADS * GROUP + of_query
    real = (which < GROUP)[:, None] & (d < WIDTH)[None, :]
    if row >= texts:
        nothing = tl.zeros([ROWS, FILLED], output.dtype.element_ty)
        tl.store(output + of_output[:, None] * WIDTH + d[None, :], nothing, mask=real)
        return
    end = tl.load(ends + row)
    first = part * SPLIT
    if first > end:
        return
    q = tl.load(query + row * query_row + of_query[:, None] * WIDTH + d[None, :], mask=real, other=0.0)
    held = (row * HEADS + head) * capacity * WIDTH

    # Its own key and value belong to the part in which it stands.
    own = end < first + SPLIT
    k_own = tl.load(key + row * key_row + head * WIDTH + d, mask=d < WIDTH, other=0.0)
    v_own = tl.load(value + row * value_row + head * WIDTH + d, mask=d < WIDTH, other=0.0)
    width = tl.where(own, WIDTH, 0)
    tl.store(keys + held + end * WIDTH + d, k_own, mask=d < width)
    tl.store(values + held + end * WIDTH + d, v_own, mask=d < width)
    score = tl.sum(q.to(tl.float32) * k_own.to(tl.float32)[None, :], 1) * SCALE
    largest = tl.where(own, score, NOTHING)
    total = tl.where(own, tl.full([ROWS], 1.0, tl.float32), 0.0)
    mixed = tl.where(own, v_own.to(tl.float32)[None, :], tl.zeros([ROWS, FILLED], tl.float32))

    least = tl.maximum(end - window + 1, first) // BLOCK * BLOCK
    for start in range(least, tl.minimum(first + SPLIT, end), BLOCK):
        at = start + n
        seen = (at < end) & (at > end - window)
        there = seen[:, None] & (d < WIDTH)[None, :]
        place = held + at[:, None] * WIDTH + d[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        v = tl.load(values + place, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        scores = tl.where(seen[None, :], scores, NOTHING)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - larger[:, None]), 0.0)
        before = tl.exp(largest - larger)
        total = total * before + tl.sum(weights, 1)
        mixed = mixed * before[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger

    if PARTS == 1:
        tl.store(output + of_output[:, None] * WIDTH + d[None, :], mixed / total[:, None], mask=real)
    else:
        place = (of_output * PARTS + part) * (WIDTH + 2)
        tl.store(partial + place[:, None] + d[None, :], mixed, mask=real)
        tl.store(partial + place + WIDTH, largest, mask=which < GROUP)
        tl.store(partial + place + WIDTH + 1, total, mask=which < GROUP)


@triton.jit
@no_type_check
def _join_parts(
    partial,
    ends,
    output,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FILLED: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(ends + row) // SPLIT
    d = tl.arange(0, FILLED)
    place = partial + (row * HEADS + head) * PARTS * (WIDTH + 2)
    mixed = tl.load(place + d, mask=d < WIDTH, other=0.0)
    largest, total = tl.load(place + WIDTH), tl.load(place + WIDTH + 1)
    for _ in range(last):
        place += WIDTH + 2
        some = tl.load(place + d, mask=d < WIDTH, other=0.0)
        top, weight = tl.load(place + WIDTH), tl.load(place + WIDTH + 1)
        larger = tl.maximum(largest, top)
        before, now = tl.exp(largest - larger), tl.exp(top - larger)
        mixed = mixed * before + some * now
        total = total * before + weight * now
        largest = larger
    tl.store(output + (row * HEADS + head) * WIDTH + d, mixed / total, mask=d < WIDTH)
