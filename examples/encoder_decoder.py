"""The encoder–decoder, step by step: shapes, masks, predictions, attention, and decoding. Run it: it takes seconds."""

import torch

from triglot import Transformer, create_look_ahead_mask, create_masks, create_padding_mask
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate

PAD, BOS, EOS = 0, 1, 2
VOCABULARY, D_MODEL, LAYERS, HEADS, D_FF = 1000, 512, 2, 8, 2048
CAPTION = "1 = may attend"


def make_model() -> Transformer:
    """A model with random weights, in evaluation mode: dropout would make every print a matter of chance."""
    return Transformer(VOCABULARY, VOCABULARY, D_MODEL, LAYERS, HEADS, D_FF).eval()


@torch.no_grad()
def demonstrate() -> None:
    """One forward pass over two short pairs, the first of them padded on both sides."""
    src, tgt = torch.randint(3, VOCABULARY, (2, 5)), torch.randint(3, VOCABULARY, (2, 4))
    src[0, -1] = tgt[0, -1] = PAD
    print("Source", list(src.shape), src, "Target", list(tgt.shape), tgt, sep="\n")

    masks = create_masks(src, tgt)
    for name, mask in zip(masks._fields, masks, strict=True):
        print(f"{name}: {list(mask.shape)}")
    print(f"\nThe first target's mask ({CAPTION}); its last column is padding:\n{masks.tgt_mask[0, 0].int()}")

    out = make_model()(src, tgt, *masks)
    print(f"\nLogits: {list(out.logits.shape)}")
    for name, attention in zip(out._fields[1:], out[1:], strict=True):
        print(f"{name}: {len(attention)} layers of {list(attention[0].shape)}")

    print("\nThe five most probable tokens after the first target's first:")
    top = out.logits[0, 0].softmax(-1).topk(5)
    for rank, (probability, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
        print(f"  {rank}. token {token}: {probability:.4f}")

    torch.set_printoptions(precision=3, sci_mode=False)
    for name, attention in zip(out._fields[1:], out[1:], strict=True):
        print(f"\n{name}, layer 0, head 0 (rows sum to 1, padding and future get 0):\n{attention[0][0, 0]}")


def show_target_mask() -> None:
    """How look-ahead and padding join: a position is seen where both allow it."""
    tgt = torch.tensor([[5, 6, 7, PAD, PAD]])
    look_ahead = create_look_ahead_mask(tgt.size(1))
    print(f"Look-ahead ({CAPTION}): row i sees positions 0 to i\n{look_ahead.int()}")
    joined = create_padding_mask(tgt) & look_ahead
    print(
        f"\nJoined with the padding of {tgt[0].tolist()} ({CAPTION}): columns 3 and 4 are hidden\n{joined[0, 0].int()}"
    )


@torch.no_grad()
def infer() -> None:
    """Greedy decoding over a cache: the source is read once, each step reads one token."""
    model, longest = make_model(), 10
    src = torch.tensor([[BOS, 5, 9, EOS, PAD, PAD]])
    steps = model.start(src, create_padding_mask(src), longest)
    first = steps.step(torch.tensor([BOS]))
    (found,) = generate(first, steps, Sampler(temperature=0.0), longest - 1, eos_id=EOS, banned=[PAD, BOS])
    print(f"Source: {src[0].tolist()}\nGenerated: {[BOS, *found.ids]}")


def main() -> None:
    """Everything, from one seed."""
    torch.manual_seed(0)
    for title, part in (("Forward", demonstrate), ("Target mask", show_target_mask), ("Inference", infer)):
        print(f"\n=== {title} ===\n")
        part()


if __name__ == "__main__":
    main()
