"""The founding document's programs as oracles: its weights load and give its logits, its demonstrations run with ours.

Its attention keeps what a mask does not mark with 0, so it is given our masks as numbers (1 = may attend), not its own.
Its mixture of experts reads a capacity that it never sets.
"""

import re

import pytest
import torch

from triglot.config import BlockOptions
from triglot.errors import CheckpointError
from triglot.layers.masks import create_look_ahead_mask, create_masks, create_padding_mask
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.positions import sinusoids
from triglot.models.decoder_only import DecoderLLM
from triglot.models.document import load_document_weights
from triglot.models.encoder_decoder import Transformer

EXACT = {"atol": 1e-5, "rtol": 0}
SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN = 23, 29, 22, 2, 11, 37, 53


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that no two tensors share, norms and biases included: a name read wrongly shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def pairs():
    src, tgt = torch.randint(1, SRC_VOCAB, (3, 7)), torch.randint(1, TGT_VOCAB, (3, 5))
    src[0, 4:], tgt[1, 3:] = 0, 0
    return src, tgt


@pytest.fixture
def their_transformer(document):
    shape = {"d_model": D_MODEL, "num_layers": LAYERS, "num_heads": HEADS, "d_ff": D_FF, "max_seq_length": MAX_LEN}
    return perturbed(document.load("encoder_decoder")["Transformer"](SRC_VOCAB, TGT_VOCAB, **shape))


def our_transformer() -> Transformer:
    return Transformer(SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN).eval()


def test_the_encoder_decoder_gives_the_documents_logits_and_attention(their_transformer, pairs):
    ours = our_transformer()
    load_document_weights(ours, their_transformer.state_dict())
    masks = create_masks(*pairs)
    expected = their_transformer(*pairs, *(mask.float() for mask in masks))
    result = ours(*pairs, *masks)
    torch.testing.assert_close(result.logits, expected[0], **EXACT)
    for attention, theirs in zip(result[1:], expected[1:], strict=True):
        torch.testing.assert_close(attention, theirs, **EXACT)


@pytest.fixture
def their_decoder(document):
    shape = (SRC_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN)
    return perturbed(document.load("decoder_only")["DecoderLLM"](*shape))


def test_the_language_model_gives_the_documents_logits_and_loss(their_decoder):
    ours = DecoderLLM(SRC_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN).eval()
    load_document_weights(ours, their_decoder.state_dict())
    ids, targets = torch.randint(SRC_VOCAB, (2, 3, 7)).unbind()
    expected, result = their_decoder(ids, targets), ours(ids, targets)
    torch.testing.assert_close(result.logits, expected[0], **EXACT)
    torch.testing.assert_close(result.loss, expected[1], **EXACT)


def test_the_language_models_gradients_are_the_documents(their_decoder):
    ours = DecoderLLM(SRC_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN).eval()
    load_document_weights(ours, their_decoder.state_dict())
    ids, targets = torch.randint(SRC_VOCAB, (2, 3, 7)).unbind()
    their_decoder(ids, targets)[1].backward()
    ours(ids, targets).loss.backward()
    gradients = {name: parameter.grad for name, parameter in their_decoder.named_parameters()}
    twin = DecoderLLM(SRC_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN)
    load_document_weights(twin, gradients)  # the gradients travel under the same names
    for (name, parameter), expected in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, expected.data, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_experts_give_the_documents_output(document, k):
    theirs = perturbed(document.load("experts")["MixtureOfExperts"](22, 5, 17, k=k))
    theirs.expert_capacity = 10**9
    ours = MixtureOfExperts(22, 5, 17, k=k).eval()
    load_document_weights(ours, theirs.state_dict())
    x = torch.randn(3, 7, 22)
    if k == 1:  # there the document's weight is always 1; ours is the probability, so that the router learns
        expected = theirs(x) * theirs.router(x).softmax(-1).amax(-1, keepdim=True)
    else:
        expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, **EXACT)


def test_the_position_tables_agree_to_the_last_row(document):
    for program in ("encoder_decoder", "decoder_only"):
        theirs = document.load(program)["PositionalEncoding"](22, 5000).pe[0]
        torch.testing.assert_close(sinusoids(5000, 22), theirs, **EXACT)


def test_weights_under_other_names_are_refused(their_transformer, their_decoder):
    complete = their_decoder.state_dict()
    model = DecoderLLM(SRC_VOCAB, D_MODEL, HEADS, LAYERS, D_FF, MAX_LEN)
    with pytest.raises(CheckpointError, match="ghost"):
        load_document_weights(model, complete | {"ghost": torch.zeros(())})
    missing = {name: tensor for name, tensor in complete.items() if name != "decoder_layers.1.self_attn.w_q.bias"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attention\.query\.bias"):
        load_document_weights(model, missing)
    with pytest.raises(CheckpointError):
        load_document_weights(model, their_transformer.state_dict())
    with pytest.raises(CheckpointError):
        load_document_weights(our_transformer(), complete)


def test_experts_of_which_one_is_missing_are_refused(document):
    state = document.load("experts")["MixtureOfExperts"](22, 5, 17).state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith("experts.3.")}
    with pytest.raises(CheckpointError):
        load_document_weights(MixtureOfExperts(22, 5, 17), without)
    unequal = state | {"experts.3.0.weight": torch.zeros(18, 22)}
    with pytest.raises(CheckpointError):
        load_document_weights(MixtureOfExperts(22, 5, 17), unequal)


def test_a_swapped_norm_would_be_seen(their_transformer, pairs):
    """The oracle can fail: exchanging two of the document's tensors changes the logits."""
    state = dict(their_transformer.state_dict())
    state["decoder.layers.1.norm1.weight"], state["decoder.layers.1.norm2.weight"] = (
        state["decoder.layers.1.norm2.weight"],
        state["decoder.layers.1.norm1.weight"],
    )
    ours = our_transformer()
    load_document_weights(ours, state)
    masks = create_masks(*pairs)
    expected = their_transformer(*pairs, *(mask.float() for mask in masks))[0]
    assert (ours(*pairs, *masks).logits - expected).abs().max() > 1e-3


class RecordingTransformer(Transformer):
    """Ours, which remembers what it was given and what it returned."""

    calls: list = []

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        self.calls.append((args, out))
        return out


@pytest.fixture
def demonstrations(document):
    """The document's first program with our classes in the place of its own."""
    namespace = document.load("encoder_decoder")
    RecordingTransformer.calls = []
    return namespace | {
        "Transformer": RecordingTransformer,
        "create_padding_mask": create_padding_mask,
        "create_look_ahead_mask": create_look_ahead_mask,
        "create_masks": create_masks,
    }


def with_ours(namespace: dict, name: str):
    """A function of the document whose globals are `namespace`."""
    function = namespace[name]
    return type(function)(function.__code__, namespace, name, function.__defaults__)


def shape_lines(text: str) -> list[str]:
    return re.findall(r"^.*(?:[Ss]hape|Number of).*$", text, re.MULTILINE)


def test_the_demonstration_prints_the_documents_shapes_with_our_classes(document, demonstrations, capsys):
    document.load("encoder_decoder")["demonstration"]()
    theirs = shape_lines(capsys.readouterr().out)
    with_ours(demonstrations, "demonstration")()
    assert len(theirs) == 11
    assert shape_lines(capsys.readouterr().out) == theirs


def test_the_demonstrations_attention_gives_nothing_to_padding_or_the_future(demonstrations, capsys):
    with_ours(demonstrations, "demonstration")()
    [((src, tgt, *_), out)] = RecordingTransformer.calls
    src_mask, tgt_mask, cross_mask = create_masks(src, tgt)
    for attention, mask in zip(out[1:], (src_mask, tgt_mask, cross_mask), strict=True):
        for weights in attention:
            assert not weights[~mask.expand_as(weights)].any()
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert not out.enc_attention[0][0, :, :, 4].any()
    assert not out.dec_self_attention[0].triu(1).any()


def test_the_inference_example_runs_with_our_classes(demonstrations, capsys):
    src, tgt = with_ours(demonstrations, "inference_example")()
    printed = capsys.readouterr().out
    assert "Source sequence: [1 5 9 2 0 0]" in printed
    assert f"Generated sequence: {tgt[0].numpy()}" in printed
    assert tgt.size(1) == 10 or tgt[0, -1] == 2
    assert src.tolist() == [[1, 5, 9, 2, 0, 0]]


def test_the_language_models_example_runs_with_our_classes(document, capsys):
    namespace = document.load("decoder_only") | {"DecoderLLM": DecoderLLM}
    exec(document.main("decoder_only"), namespace)
    printed = capsys.readouterr().out
    assert "Model parameters: 70,378,496\n" in printed
    assert "Logits shape: torch.Size([2, 10, 50257])\n" in printed
    assert re.search(r"^Loss: 1[01]\.\d+$", printed, re.MULTILINE)  # near ln 50257 = 10.8: nothing is learned yet
    assert "Generated sequence length: 15\n" in printed


def test_the_experts_example_runs_with_our_class(document, capsys):
    namespace = document.load("experts") | {"MixtureOfExperts": MixtureOfExperts}
    with_ours(namespace, "test_moe")()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["Input shape: torch.Size([32, 128, 512])", "Output shape: torch.Size([32, 128, 512])"]
    assert printed[-1] == "- Expert capacity: 1024"


def test_the_documents_models_are_the_default_options():
    plain, spelled_out = (
        our_transformer(),
        Transformer(SRC_VOCAB, TGT_VOCAB, D_MODEL, LAYERS, HEADS, D_FF, MAX_LEN, options=BlockOptions()),
    )
    assert {name: p.shape for name, p in plain.named_parameters()} == {
        name: p.shape for name, p in spelled_out.named_parameters()
    }
