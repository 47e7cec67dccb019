"""The mixture of experts, step by step: routing, capacity, loads, losses. Run it: it takes seconds."""

import torch

from triglot import MixtureOfExperts

BATCH, LENGTH, HIDDEN, EXPERTS, EXPERT, K = 32, 128, 512, 8, 1024, 2


def main() -> None:
    """One layer of the founding document's size on random vectors."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    layer = MixtureOfExperts(hidden_dim=HIDDEN, num_experts=EXPERTS, expert_dim=EXPERT, k=K)
    print(f"Input: {list(x.shape)}")

    with torch.no_grad():
        output, routing = layer.run(x)
    print(f"Output: {list(output.shape)}")
    print(f"Experts: {EXPERTS} of inner width {EXPERT}, {K} for each token")
    print(f"Capacity: {layer.expert_capacity} tokens for each expert (factor 1.0 · {K} · {BATCH * LENGTH} / {EXPERTS})")
    print(f"Dropped, since no router is perfectly even: {routing.dropped:.2%} of all choices")

    print("\nThe first token's experts and weights, and each expert's load (1.00 = an even share):")
    print(f"  {routing.experts[0, 0].tolist()} {[round(w, 3) for w in routing.weights[0, 0].tolist()]}")
    print(f"  {[round(load * EXPERTS, 2) for load in routing.load.tolist()]}")
    print(
        f"Balance loss: {routing.balance:.3f} (1 = even), z-loss: {routing.z:.3f}, entropy: {routing.entropy:.3f} nats"
    )

    with torch.no_grad():
        kept = layer.eval().run(x).routing
    print(f"\nIn evaluation nothing is dropped: {kept.dropped:.2%}")


if __name__ == "__main__":
    main()
