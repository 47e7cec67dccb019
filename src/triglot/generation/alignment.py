"""Which source tokens a target token renders (Shift-Att, Chen et al. 2020), read off a finished translation."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from triglot.generation.results import Alignment
from triglot.layers.masks import NO_PADDING, create_masks
from triglot.models.encoder_decoder import Transformer
from triglot.tokenizer import Tokenizer, Tokenizers


@torch.no_grad()
def align(model: Transformer, tokenizers: Tokenizers, source: Sequence[int], produced: Sequence[int]) -> Alignment:
    """The alignment of the tokens `produced`, without the end token, in the layer that aligns best.

    One forward pass over this pair alone, in the model's own type, so that it does not depend on its company.
    """
    text = text_places(tokenizers.source, source)
    columns = tokenizers.source.pieces(source[place] for place in text)
    if not produced:
        return Alignment([], columns, [])
    device = model.projection.weight.device
    src = torch.tensor([list(source)], device=device)
    tgt = torch.tensor([[tokenizers.target.ids.start, *produced]], device=device)
    masks = create_masks(src, tgt, pad_id=NO_PADDING)
    layers = model.run(src, tgt, *masks, need_weights=True).dec_enc_attention
    assert layers is not None
    weights, _ = shifted(layers[best_layer(len(layers))][0].float(), text)
    return Alignment(tokenizers.target.pieces(produced), columns, weights.tolist())


def best_layer(layers: int) -> int:
    """The layer in the middle: of six Chen et al. found the third to align best."""
    return (layers - 1) // 2


def text_places(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where tokens stand that are text: no begin or end, no tag."""
    return [place for place, token in enumerate(ids) if tokenizer.token_bytes(token)]


def shifted(
    attention: Float[Tensor, "heads target source"], text: Sequence[int]
) -> tuple[Float[Tensor, "produced text"], Float[Tensor, " produced"]]:
    """The alignment of every produced token with the source's tokens `text`, and what fell on all others.

    It is the heads' mean at the step where the token is the decoder's input, not where it is its output.
    """
    rows = attention.mean(0)[1:]  # row 0 reads the begin token, row i the i-th produced one
    kept = rows[:, list(text)]
    mass = kept.sum(1, keepdim=True)
    return kept / mass.clamp(min=torch.finfo(mass.dtype).tiny), 1 - mass[:, 0]
