"""A layer of experts from the outside: shapes, capacity, loads, what is dropped, and what the balance loss says of it.

Run it by `python examples/mixture_of_experts.py`.
"""

import torch

from triglot import BlockOptions, DecoderLLM, ExpertOptions, MixtureOfExperts

BATCH, LENGTH, HIDDEN, EXPERTS, INNER, K = 32, 128, 512, 8, 1024, 2


def bars(shares: list[float]) -> str:
    """One line an expert, its share as a number and a bar."""
    return "\n".join(
        f"  expert {expert}: {share:6.2%} {'#' * round(200 * share)}" for expert, share in enumerate(shares)
    )


@torch.no_grad()
def show_layer() -> None:
    """One call in training mode, where an expert takes only so many tokens, and one in evaluation mode."""
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    moe = MixtureOfExperts(HIDDEN, EXPERTS, INNER, K)
    output, routing = moe.run(x)
    print(f"Input shape: {list(x.shape)}")
    print(f"Output shape: {list(output.shape)}")
    print(f"{EXPERTS} experts of inner width {INNER}, {K} for each token, {BATCH * LENGTH:,} tokens")
    print(f"Expert capacity: {moe.expert_capacity:,}")
    print(f"Load, as shares of all choices (even would be {1 / EXPERTS:.2%}):\n{bars(routing.load.tolist())}")
    print(f"Balance loss: {routing.balance.item():.4f} (1 is perfect)")
    print(f"Router z-loss: {routing.z.item():.4f}")
    print(
        f"Entropy of the router: {routing.entropy.item():.3f} of at most {torch.tensor(EXPERTS).log().item():.3f} nats"
    )
    print(f"Dropped in training: {routing.dropped.item():.2%} of the choices found their expert full")
    print(f"Dropped in evaluation: {moe.eval().run(x).routing.dropped.item():.2%}")


@torch.no_grad()
def show_padding() -> None:
    """Padding visits no expert."""
    moe = MixtureOfExperts(HIDDEN, EXPERTS, INNER, K).eval()
    x, mask = torch.randn(1, 4, HIDDEN), torch.tensor([[True, True, True, False]])
    output, routing = moe.run(x, mask)
    print(f"Experts of three tokens and one that is padding: {routing.experts[0, :3].tolist()}, none")
    print(f"Largest output of the padding: {output[0, 3].abs().max().item():g}")


def show_model() -> None:
    """Experts in every second block of a language model; their losses are part of its loss in training."""
    options = BlockOptions(activation="gelu", experts=ExpertOptions(num_experts=EXPERTS, top_k=K, every=2))
    model = DecoderLLM(1000, 128, 4, 4, 256, options=options, dropout=0.0)
    ids = torch.randint(1000, (4, 33))
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    loss.backward()
    routing = model.run(ids).routing
    print(f"A language model with experts in {len(routing)} of {len(model.layers)} blocks, loss {loss.item():.3f}")
    for number, layer in enumerate(routing):
        print(f"  layer of experts {number}: fullest expert has {layer.load.max().item():.2%} of the choices")


def main() -> None:
    """All of it, the same every time."""
    torch.manual_seed(0)
    show_layer()
    show_padding()
    show_model()


if __name__ == "__main__":
    main()
