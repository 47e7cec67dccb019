"""What the example programs say, beside what holds."""

import ast
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def say(name: str, capsys) -> str:
    with torch.random.fork_rng():
        options = torch._tensor_str.PRINT_OPTS.precision
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        torch.set_printoptions(precision=options, sci_mode=None)
    return capsys.readouterr().out


@pytest.fixture
def encoder_decoder(capsys) -> str:
    return say("encoder_decoder", capsys)


def test_the_encoder_decoder_shows_every_shape(encoder_decoder):
    for line in (
        "src_mask: [2, 1, 1, 5]",
        "tgt_mask: [2, 1, 4, 4]",
        "cross_mask: [2, 1, 1, 5]",
        "Logits: [2, 4, 1000]",
        "enc_attention: 2 layers of [2, 8, 5, 5]",
        "dec_self_attention: 2 layers of [2, 8, 4, 4]",
        "dec_enc_attention: 2 layers of [2, 8, 4, 5]",
    ):
        assert line in encoder_decoder.splitlines()


def test_the_printed_attention_sums_to_one_and_is_zero_on_padding_and_future(encoder_decoder):
    tables = encoder_decoder.split("get 0):\ntensor(")[1:]
    assert len(tables) == 3
    enc, dec, cross = (torch.tensor(ast.literal_eval(table[: table.index("]]") + 2])) for table in tables)
    for table in (enc, dec, cross):
        torch.testing.assert_close(table.sum(-1), torch.ones(len(table)), atol=3e-3, rtol=0)
    assert not enc[:, -1].any()
    assert not cross[:, -1].any()
    assert not dec.triu(1).any()
    assert not dec[:, -1].any()


def test_the_target_mask_hides_the_columns_of_padding(encoder_decoder):
    table = encoder_decoder.split("columns 3 and 4 are hidden\ntensor(")[1]
    mask = torch.tensor(ast.literal_eval(table[: table.index("]]") + 2]))
    expected = torch.ones(5, 5).tril()
    expected[:, 3:] = 0
    assert torch.equal(mask.float(), expected)


def test_the_generated_sentence_begins_with_bos_and_has_at_most_ten_tokens(encoder_decoder):
    ids = ast.literal_eval(encoder_decoder.split("Generated: ")[1].splitlines()[0])
    assert ids[0] == 1
    assert len(ids) <= 10
    assert 0 not in ids


def test_the_decoder_only_program_shows_size_loss_and_length(capsys):
    said = say("decoder_only", capsys).splitlines()
    assert "Parameters: 70,378,496" in said
    assert "Logits: [2, 10, 50257]" in said
    assert "Generated length: 15" in said
    told = next(line for line in said if line.startswith("Loss before"))
    before, after = map(float, told.split(": ")[1].split(", "))
    assert after < before


def test_the_mixture_of_experts_shows_capacity_loads_and_drops(capsys):
    said = say("mixture_of_experts", capsys)
    assert "Output: [32, 128, 512]" in said
    assert "Capacity: 1024 tokens" in said
    assert "In evaluation nothing is dropped: 0.00%" in said
