"""The example programs run as they are, and what they print is what the library says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from triglot import DecoderLLM, MixtureOfExperts, Transformer, create_masks

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    """What the program prints, warnings being errors, in a process of its own."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, encoding="utf-8").stdout


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_below(caption: str, text: str) -> list[list[float]]:
    """The matrix printed under the line that holds `caption`."""
    block = re.search(rf"{re.escape(caption)}[^\n]*\n((?:  [-\d. ]+\n)+)", text)
    return [[float(value) for value in line.split()] for line in block[1].splitlines()]


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return {name: run(name) for name in ("encoder_decoder", "decoder_only", "mixture_of_experts")}


def test_every_example_is_run_here_and_is_short(printed):
    programs = sorted(EXAMPLES.glob("*.py"))
    assert {path.stem for path in programs} == set(printed)
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 150 for path in programs)


def test_the_encoder_decoder_prints_the_librarys_shapes_and_masks(printed):
    text, example = printed["encoder_decoder"], load("encoder_decoder")
    torch.manual_seed(0)
    model = example.make_model()
    src, tgt = example.padded_pair()
    masks = create_masks(src, tgt)
    out = model(src, tgt, *masks)
    assert isinstance(model, Transformer)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert f"Logits: {list(out.logits.shape)}" in text
    for name in out._fields[1:]:
        attention = getattr(out, name)
        assert f"{name}: {len(attention)} layers of {list(attention[0].shape)}" in text
    assert (
        numbers_below("Target mask of the first pair (1 = may attend)", text) == masks.tgt_mask[0, 0].float().tolist()
    )
    for caption, weights in (
        ("source to source", out.enc_attention), ("target to target", out.dec_self_attention),
        ("target to source", out.dec_enc_attention),
    ):  # fmt: skip
        shown = torch.tensor(numbers_below(caption, text))
        torch.testing.assert_close(shown, weights[0][0, 0].detach(), atol=6e-4, rtol=0)
    assert "Weight on padding and on the future: 0\n" in text
    assert "Rows sum to 1: True" in text
    best = out.logits[0, 0].softmax(-1).topk(5)
    for rank in range(5):
        assert f"  {rank + 1}. token {best.indices[rank]}: {best.values[rank]:.4f}" in text


def test_the_encoder_decoders_masks_of_a_target_are_true_to_their_captions(printed):
    text = printed["encoder_decoder"]
    assert numbers_below("Look-ahead (1 = may attend)", text) == torch.ones(5, 5).tril().tolist()
    joined = torch.tensor(numbers_below("Both joined", text))
    assert not joined[:, 3:].any()
    assert joined[:, :3].equal(torch.ones(5, 3).tril())


def test_the_encoder_decoder_decodes_what_re_reading_every_prefix_gives(printed):
    text, example = printed["encoder_decoder"], load("encoder_decoder")
    torch.manual_seed(0)
    model = example.make_model()
    generated = [int(token) for token in re.search(r"Generated: \[(.*)\]", text)[1].split(", ")]
    src = torch.tensor([[1, 5, 9, 2]])  # without its padding
    ids = [1]
    while len(ids) < len(generated):
        tgt = torch.tensor([ids])
        logits = model(src, tgt, *create_masks(src, tgt)).logits[0, -1]
        logits[[0, 1]] = float("-inf")
        ids.append(int(logits.argmax()))
    assert ids == generated
    assert len(generated) == 10 or generated[-1] == 2


def test_the_language_model_prints_its_size_loss_and_lengths(printed):
    text, example = printed["decoder_only"], load("decoder_only")
    assert "Model parameters: 70,378,496\n" in text
    assert "Logits shape: [2, 10, 50257]\n" in text
    assert "weight on the future 0\n" in text
    assert "Generated sequence length: 15\n" in text
    assert "goes on as it does alone: True" in text
    assert numbers_below("Look-ahead mask [1, 1, 5, 5]", text) == torch.ones(5, 5).tril().tolist()
    torch.manual_seed(0)
    model = DecoderLLM(example.VOCAB, example.D_MODEL, example.HEADS, example.LAYERS, example.D_FF).eval()
    ids = torch.randint(example.VOCAB, (2, 11))
    assert f"Loss: {model(ids[:, :-1], ids[:, 1:]).loss.item():.3f} nats" in text
    before, after = map(float, re.search(r"one training step: ([\d.]+), ([\d.]+)", text).groups())
    assert after < before


def test_the_mixture_prints_its_capacity_loads_and_losses(printed):
    text, example = printed["mixture_of_experts"], load("mixture_of_experts")
    assert "Input shape: [32, 128, 512]\nOutput shape: [32, 128, 512]\n" in text
    assert "Expert capacity: 1,024\n" in text
    torch.manual_seed(0)
    x = torch.randn(example.BATCH, example.LENGTH, example.HIDDEN)
    routing = MixtureOfExperts(example.HIDDEN, example.EXPERTS, example.INNER, example.K).run(x).routing
    loads = [float(share) / 100 for share in re.findall(r"  expert \d: +([\d.]+)%", text)]
    torch.testing.assert_close(torch.tensor(loads), routing.load, atol=1e-4, rtol=0)
    assert sum(loads) == pytest.approx(1, abs=1e-3)
    assert f"Balance loss: {routing.balance.item():.4f} " in text
    assert f"Dropped in training: {routing.dropped.item():.2%} " in text
    assert "Dropped in evaluation: 0.00%\n" in text
    assert "Largest output of the padding: 0\n" in text
