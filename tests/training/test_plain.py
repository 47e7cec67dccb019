"""What holds for the founding document's training step."""

import pytest
import torch

from triglot import train_step
from triglot.config import BlockOptions, ExpertOptions
from triglot.models.decoder_only import DecoderLLM

VOCAB = 13


def make_model(**options) -> DecoderLLM:
    torch.manual_seed(0)
    shape = {"d_model": 6, "n_heads": 2, "n_layers": 1, "d_ff": 11, "max_len": 17}
    return DecoderLLM(VOCAB, **shape, dropout=0.0, options=BlockOptions(**options))


def test_slices_of_one_row_of_ids_are_a_batch():
    model, ids = make_model(), torch.randint(VOCAB, (3, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model(ids[:, :-1], ids[:, 1:]).loss.item()
    assert train_step(model, (ids[:, :-1], ids[:, 1:]), optimizer) == pytest.approx(expected)


def test_steps_on_one_batch_lower_its_loss_and_end_in_training_mode():
    model, ids = make_model().eval(), torch.randint(VOCAB, (3, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = [train_step(model, (ids[:, :-1], ids[:, 1:]), optimizer) for _ in range(11)]
    assert losses[-1] < losses[0]
    assert model.training


def test_gradients_of_an_earlier_step_do_not_linger():
    ids = torch.randint(VOCAB, (3, 8))
    batch = ids[:, :-1], ids[:, 1:]
    clean, stained = make_model(), make_model()
    for weight in stained.parameters():
        weight.grad = torch.ones_like(weight)
    for model in (clean, stained):
        train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(*pair) for pair in zip(clean.parameters(), stained.parameters(), strict=True))


def test_the_router_learns_from_the_expert_losses():
    model, ids = make_model(experts=ExpertOptions(num_experts=3, top_k=1)), torch.randint(VOCAB, (3, 8))
    train_step(model, (ids[:, :-1], ids[:, 1:]), torch.optim.SGD(model.parameters(), lr=0.1))
    assert any(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if "router" in name)
