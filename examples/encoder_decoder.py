"""The encoder–decoder from the outside: shapes, masks, predictions, attention, and decoding, with untrained weights.

Run it by `python examples/encoder_decoder.py`; the numbers mean nothing yet, the shapes and the zeros do.
"""

import torch
from torch import Tensor

from triglot import Transformer, create_look_ahead_mask, create_masks, create_padding_mask
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate

PAD, BOS, EOS = 0, 1, 2
VOCAB, D_MODEL, LAYERS, HEADS, D_FF = 1000, 512, 2, 8, 2048


def heading(text: str) -> None:
    """A line that begins a part."""
    print(f"\n=== {text} ===")


def table(matrix: Tensor) -> str:
    """A matrix, one row a line, numbers with as many decimals as they need."""
    form = "{:.0f}" if not matrix.is_floating_point() else "{:.3f}"
    return "\n".join("  " + " ".join(form.format(value) for value in row) for row in matrix.tolist())


def make_model() -> Transformer:
    """Two layers each side, in evaluation mode: what is printed is the model, not its dropout."""
    return Transformer(VOCAB, VOCAB, D_MODEL, LAYERS, HEADS, D_FF).eval()


def padded_pair() -> tuple[Tensor, Tensor]:
    """Two sources of five tokens and two targets of four; the first of each ends in padding."""
    src, tgt = torch.randint(3, VOCAB, (2, 5)), torch.randint(3, VOCAB, (2, 4))
    src[0, -1], tgt[0, -1] = PAD, PAD
    return src, tgt


@torch.no_grad()
def show_forward(model: Transformer) -> None:
    """One pass over a padded pair."""
    src, tgt = padded_pair()
    masks = create_masks(src, tgt)
    heading("One forward pass")
    print(f"Source {list(src.shape)}:\n{table(src)}")
    print(f"Target {list(tgt.shape)}:\n{table(tgt)}")
    print(f"Source mask: {list(masks.src_mask.shape)}")
    print(f"Target mask, look-ahead and padding: {list(masks.tgt_mask.shape)}")
    print(f"Mask of the decoder over the source: {list(masks.cross_mask.shape)}")
    out = model(src, tgt, *masks)
    print(f"Logits: {list(out.logits.shape)}")
    for name, attention in zip(out._fields[1:], out[1:], strict=True):
        print(f"{name}: {len(attention)} layers of {list(attention[0].shape)}")
    print(f"Target mask of the first pair (1 = may attend):\n{table(masks.tgt_mask[0, 0].int())}")

    print("Five most probable tokens after the first of the first target:")
    probabilities, tokens = out.logits[0, 0].softmax(-1).topk(5)
    for rank, (token, probability) in enumerate(zip(tokens.tolist(), probabilities.tolist(), strict=True), 1):
        print(f"  {rank}. token {token}: {probability:.4f}")

    print("Attention in layer 0, head 0 of the first pair (rows: who attends, columns: to whom):")
    print(f"source to source; column 4 is padding\n{table(out.enc_attention[0][0, 0])}")
    print(f"target to target; what is right of the diagonal is yet to come\n{table(out.dec_self_attention[0][0, 0])}")
    print(f"target to source; column 4 is padding\n{table(out.dec_enc_attention[0][0, 0])}")
    real = masks.tgt_mask[0, 0, -1]
    hidden = [out.enc_attention[0][0, :, :, 4], out.dec_self_attention[0].triu(1), out.dec_enc_attention[0][0, :, :, 4]]
    print(f"Weight on padding and on the future: {sum(weights.sum().item() for weights in hidden):g}")
    sums = out.dec_self_attention[0][0, :, real].sum(-1)
    print(f"Rows sum to 1: {torch.allclose(sums, torch.ones_like(sums))}")


def show_target_mask() -> None:
    """How look-ahead and padding join."""
    heading("Masks of a target")
    look_ahead = create_look_ahead_mask(5)
    print(f"Look-ahead (1 = may attend): each position sees itself and what came before\n{table(look_ahead.int())}")
    tgt = torch.tensor([[BOS, 5, 7, PAD, PAD]])
    joined = create_padding_mask(tgt) & look_ahead
    print(f"Target, its last two tokens padding:\n{table(tgt)}")
    print(f"Both joined by `and` (1 = may attend): columns 3 and 4 are hidden from all\n{table(joined[0, 0].int())}")
    print("Rows 3 and 4 belong to padding; what they compute is read by no one and scored nowhere.")


def show_decoding(model: Transformer) -> None:
    """Greedy decoding of one padded source: the source is read once, then each step reads one token."""
    heading("Greedy decoding")
    src = torch.tensor([[BOS, 5, 9, EOS, PAD, PAD]])
    limit = 9
    with torch.no_grad():
        steps = model.start(src, create_padding_mask(src), limit)
        first = steps.step(torch.tensor([BOS]))
        [text] = generate(first, steps, Sampler(temperature=0.0), limit, eos_ids=[EOS], banned=[PAD, BOS])
    print(f"Source: {src[0].tolist()}")
    print(f"Generated: {[BOS, *text.ids]}")
    print(f"Log-probability: {text.log_prob:.2f}; stopped by {'the limit' if text.truncated else 'the end token'}")


def main() -> None:
    """All of it, the same every time."""
    torch.manual_seed(0)
    model = make_model()
    print(f"Transformer with {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    show_forward(model)
    show_target_mask()
    show_decoding(model)


if __name__ == "__main__":
    main()
