"""A decoder-only model as it reads one token of each of some texts on a GPU: few operations, none of which waits.

Every tensor has one shape and one place whatever the texts are, so that the operations can be captured once and
launched together (`captured.py`). The blocks are the model's own, attention excepted, and so are the weights.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triglot.blocks import Block
from triglot.decoding.logits import Scored
from triglot.decoding.sampling import first_largest
from triglot.generation.one_token import OneTokenAttention, written
from triglot.generation.prepared import filled_up_projection
from triglot.layers.attend import FORBIDDEN
from triglot.layers.attention import Attention, MultiHeadAttention
from triglot.layers.positions import Rotation, signed
from triglot.models.decoder_only import DecoderLLM

Rows = Float[Tensor, "rows 1 width"]
Heads = Float[Tensor, "rows some head_dim"]
Ends = Int[Tensor, " rows"]
Held = Float[Tensor, "texts kv_heads capacity head_dim"]
HeldByLayer = Float[Tensor, "layers texts kv_heads capacity head_dim"]

HAS_TRITON = find_spec("triton") is not None
OPTIONS = {"coordinate_descent_tuning": True}
"""Of the compiler: one text's products as loops of its own, each of them in the best of several ways."""


class Place(NamedTuple):
    """What a layer holds of each text, and where the token stands that is read."""

    keys: Held
    values: Held
    ends: Ends


class HeldAttention(OneTokenAttention):
    """`MultiHeadAttention` of one token of each text, to itself and to what is held of its text.

    Queries, keys and values come of one product: the three weights become parts of one tensor, in the model too.
    """

    def __init__(self, attention: MultiHeadAttention, window: int | None = None) -> None:
        super().__init__(attention)
        self.window, self.output = window, attention.output
        query, key, value = attention.query, attention.key, attention.value
        self.weight = in_one_piece([query.weight, key.weight, value.weight])
        self.bias = None if query.bias is None else in_one_piece([query.bias, key.bias, value.bias])

    def forward(
        self, x: Rows, *_: Any, cache: Place, rotation: Rotation | None, bias: Tensor | None, **_also: Any
    ) -> Attention:
        """As a block calls it, for which queries, keys and values are of the same row; without `bias` by our kernel."""
        query, key, value = self.parts(F.linear(written(x), self.weight, self.bias), rotation)
        if bias is None:
            from triglot.generation.flash_decoding import attend_to_held

            mixed = attend_to_held(query, key, value, *cache, self.scale, self.window)
        else:
            mixed = self.attend(query, key, value, cache, bias)
        return Attention(self.output(mixed.reshape(len(x), 1, -1)), None)

    def attend(
        self, query: Heads, key: Heads, value: Heads, cache: Place, bias: Float[Tensor, "rows kv_heads group capacity"]
    ) -> Tensor:
        """The same by PyTorch's kernel: heads that share keys and values are queries of one head."""
        row = torch.arange(len(query), device=query.device)
        for held, new in zip(cache[:2], (key, value), strict=True):
            held[row, :, cache.ends] = new
        query = query.unflatten(1, (self.kv_heads, -1))
        return F.scaled_dot_product_attention(query, cache.keys, cache.values, attn_mask=bias, scale=self.scale)


class Projection(nn.Module):
    """`nn.Linear` of what is written out first: the compiler would else make it anew for every few outputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Rows) -> Rows:
        return F.linear(written(x), self.weight, self.bias)


def in_one_piece(parts: Sequence[Tensor]) -> Tensor:
    """Tensors behind one another in one, of which each of them becomes a part."""
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return whole


class TokenReader:
    """A model's step over texts that are held. Its weights must not change."""

    def __init__(self, model: DecoderLLM, banned: Sequence[int] = (), *, compiled: bool = False) -> None:
        own = {id(part): part for part in (*model.parameters(), *model.buffers())}  # which are not copied
        self.model: DecoderLLM = copy.deepcopy(model, own).eval()
        self.blocks: list[Block] = list(self.model.layers)  # type: ignore[arg-type]  # a ModuleList tells of no kind
        for block in self.blocks:
            block.self_attention = HeldAttention(block.self_attention, model.options.window)  # type: ignore[assignment]  # it is called alike
            for name, part in block.feed_forward.named_children():
                if isinstance(part, nn.Linear):
                    setattr(block.feed_forward, name, Projection(part))
        self.weight, self.head_bias = filled_up_projection(model.lm_head, banned)
        like = model.lm_head.weight
        self.has_kernel = HAS_TRITON and like.is_cuda and like.itemsize <= 4 and model.relative is None
        compiler = partial(torch.compile, fullgraph=True, dynamic=False, options=OPTIONS) if compiled else None
        self._block: Callable[..., Rows] = read_block if compiler is None else compiler(read_block)
        self._end: Callable[[Rows], tuple[Tensor, ...]] = self.end if compiler is None else compiler(self.end)

    def __call__(self, tokens: Int[Tensor, " rows"], ends: Ends, keys: HeldByLayer, values: HeldByLayer) -> Scored:
        """Read a token of each text, at its end; keys and values join those held there.

        With our kernel there may be rows behind those of the texts, which attend to nothing.
        """
        model = self.model
        x, rotation = model.embedding(tokens[:, None], ends[:, None])
        rotation = None if rotation is None else signed(rotation)
        bias = None if self.has_kernel else self.bias(ends, keys.size(3)).to(x.dtype)
        for block, of_keys, of_values in zip(self.blocks, keys, values, strict=True):
            x = self._block(block, x, rotation, bias, Place(of_keys, of_values, ends))
        return Scored(*self._end(x))

    def bias(self, ends: Ends, capacity: int) -> Float[Tensor, "rows kv_heads group capacity"]:
        """What is added to scores: what hides all that is not of a text, and what is known of distances."""
        model, at = self.model, ends[:, None]
        place = torch.arange(capacity, device=ends.device)[None]
        hidden = place > at
        if (window := model.options.window) is not None:
            hidden = hidden | (place <= at - window)
        bias = (hidden * FORBIDDEN)[:, None, None]
        if model.relative is not None:
            bias = bias + model.relative(at, place)
        heads = self.blocks[0].self_attention.num_heads
        return bias.expand(-1, heads, -1, -1).reshape(len(ends), model.num_kv_heads, -1, capacity)

    def end(self, x: Rows) -> tuple[Tensor, ...]:
        """Logits [rows, filled_up_vocab], the first largest one of each row, and log Σ exp [rows, 1]."""
        model = self.model
        hidden = model.final_norm(x)[:, 0]
        hidden = hidden if model.output_scale is None else hidden * model.output_scale
        logits = F.linear(written(hidden), self.weight, self.head_bias).float()
        return logits, first_largest(logits), logits.logsumexp(1, keepdim=True)


def read_block(block: Block, x: Rows, rotation: Rotation | None, bias: Tensor | None, place: Place) -> Rows:
    """One block's work on a token of each text."""
    return block.run(x, rotation=rotation, position_bias=bias, cache=place).x  # type: ignore[arg-type]  # what HeldAttention takes
