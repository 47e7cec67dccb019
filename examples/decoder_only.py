"""The language model from the outside: its size, loss, one training step, and what it generates, untrained.

Run it by `python examples/decoder_only.py`: a model of GPT-2's vocabulary, so it takes some seconds.
"""

import math

import torch

from triglot import DecoderLLM, create_look_ahead_mask, train_step

VOCAB, D_MODEL, HEADS, LAYERS, D_FF = 50_257, 512, 8, 6, 2048


@torch.no_grad()
def show_forward(model: DecoderLLM) -> None:
    """Logits and loss of random text."""
    ids = torch.randint(VOCAB, (2, 11))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    out = model(inputs, targets)
    print(f"Logits shape: {list(out.logits.shape)}")
    print(f"Loss: {out.loss.item():.3f} nats a token; guessing blindly costs ln {VOCAB} = {math.log(VOCAB):.3f}")
    attention = model.run(inputs, need_weights=True).self_weights
    future = sum(weights.triu(1).sum().item() for weights in attention)
    print(f"Attention: {len(attention)} layers of {list(attention[0].shape)}, weight on the future {future:g}")
    causal = model.create_causal_mask(5)
    print(f"Look-ahead mask {list(causal.shape)} (1 = may attend):")
    for row in create_look_ahead_mask(5).int().tolist():
        print("  " + " ".join(map(str, row)))


def show_training_step(model: DecoderLLM) -> None:
    """The same batch twice: the loss falls."""
    ids = torch.randint(VOCAB, (2, 11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = [train_step(model, (ids[:, :-1], ids[:, 1:]), optimizer) for _ in range(2)]
    print(f"Loss before and after one training step: {losses[0]:.3f}, {losses[1]:.3f}")


def show_generation(model: DecoderLLM) -> None:
    """Sampling, greedy decoding, and prompts of different lengths in one batch."""
    prompt = torch.randint(VOCAB, (1, 5))
    generator = torch.Generator().manual_seed(0)
    sampled = model.generate(prompt, max_new_tokens=10, temperature=0.8, top_k=50, generator=generator)
    print(f"Generated sequence length: {sampled.size(1)}")
    print(f"Prompt: {prompt[0].tolist()}")
    print(f"Sampled: {sampled[0, 5:].tolist()}")
    print(f"Greedy: {model.generate(prompt, max_new_tokens=10, temperature=0.0)[0, 5:].tolist()}")
    prompts = torch.randint(VOCAB, (2, 5))
    lengths = torch.tensor([5, 2])  # the second prompt is two tokens long, the rest of its row is padding
    together = model.generate(prompts, 3, 0.0, lengths=lengths)
    alone = model.generate(prompts[1:, :2], 3, 0.0)
    print(f"A short prompt beside a longer one goes on as it does alone: {together[1, :5].equal(alone[0])}")


def main() -> None:
    """All of it, the same every time."""
    torch.manual_seed(0)
    model = DecoderLLM(VOCAB, D_MODEL, HEADS, LAYERS, D_FF).eval()
    print(f"Model parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
    show_forward(model)
    show_generation(model)
    show_training_step(model)


if __name__ == "__main__":
    main()
