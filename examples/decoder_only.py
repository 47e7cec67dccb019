"""The decoder-only model, step by step: size, loss, a training step, generation. Run it: it takes seconds."""

import torch

from triglot import DecoderLLM, train_step

VOCABULARY = 50_257  # GPT-2's


def main() -> None:
    """A model of the founding document's size on random tokens."""
    torch.manual_seed(0)
    model = DecoderLLM(VOCABULARY, d_model=512, n_heads=8, n_layers=6, d_ff=2048)
    print(f"Parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")

    mask = model.create_causal_mask(5)
    print(f"Look-ahead mask {list(mask.shape)} (1 = may attend):\n{mask[0, 0].int()}")

    text = torch.randint(VOCABULARY, (2, 11))
    inputs, targets = text[:, :-1], text[:, 1:]  # each token is to be predicted from those before it
    logits, loss = model(inputs, targets)
    assert loss is not None
    print(f"Logits: {list(logits.shape)}")
    nothing_known = torch.tensor(VOCABULARY).log().item()
    print(f"Loss: {loss.item():.3f} nats; who knows nothing has log {VOCABULARY:,} = {nothing_known:.3f}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [train_step(model, (inputs, targets), optimizer) for _ in range(2)]
    print(f"Loss before each of two training steps: {losses[0]:.3f}, {losses[1]:.3f}")

    prompt = torch.randint(VOCABULARY, (1, 5))
    longer = model.generate(prompt, max_new_tokens=10, temperature=0.8)
    print(f"Generated length: {longer.size(1)}\nIds: {longer[0].tolist()}")


if __name__ == "__main__":
    main()
