"""llama2.c's files: its own model tells here the story that it tells there."""

import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from triglot.errors import CheckpointError
from triglot.generation.engine import load
from triglot.interop import llama2c
from triglot.interop.convert import read_model
from triglot.interop.runs import to_run

HEADER = (8, 12, 1, 2, 1, 20, 6)


@pytest.mark.skipif("TRIGLOT_DATA" not in os.environ, reason="TRIGLOT_DATA does not name the data folder")
def test_greedy_text_is_the_published_one():
    """The beginning of what llama2.c prints of stories260K at temperature 0, as its own tests have it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = Path(os.environ["TRIGLOT_DATA"]) / "models" / "stories260K"
    model, _ = read_model(folder / "stories260K.bin")
    ids = model.generate(torch.tensor([[1]]), 199, temperature=0.0)[0].tolist()
    text = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok512.model")).decode(ids)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
        " a big, red ball. She wanted to play with it, but it was too high."
    )


@pytest.mark.skipif("TRIGLOT_DATA" not in os.environ, reason="TRIGLOT_DATA does not name the data folder")
def test_it_goes_on_from_a_text_with_the_tokenizer_beside_it(tmp_path):
    pytest.importorskip("sentencepiece")
    folder = Path(os.environ["TRIGLOT_DATA"]) / "models" / "stories260K"
    [found] = load(folder / "stories260K.bin").generate(["Once upon"], temperature=0.0, max_new_tokens=20)
    assert found.text.startswith(" a time, there was a little girl named Lily.")
    to_run(folder / "stories260K.bin", tmp_path / "run")
    assert load(tmp_path / "run").generate(["Once upon"], temperature=0.0, max_new_tokens=20) == [found]
    shutil.copy(folder / "stories260K.bin", tmp_path / "alone.bin")
    with pytest.raises(CheckpointError, match="one .model of SentencePiece in its folder"):
        load(tmp_path / "alone.bin")


def size_of(header: tuple[int, ...]) -> int:
    width, d_ff, layers, heads, kv_heads, vocab, longest = header
    kv_width = width // heads * kv_heads
    layer = 2 * width + 2 * width * width + 2 * kv_width * width + 3 * d_ff * width
    tables = longest * width // heads + (width * -vocab if vocab < 0 else 0)
    return 28 + 4 * (abs(vocab) * width + layers * layer + width + tables)


@pytest.mark.parametrize("vocab", [20, -20])
def test_a_file_is_as_long_as_its_header_says(vocab, tmp_path):
    header = (*HEADER[:5], vocab, HEADER[6])
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<7i", *header).ljust(size_of(header), b"\0"))
    model, config = read_model(path)
    assert config.vocab_size == 20
    assert config.options.tie_embeddings == (vocab > 0)
    assert model.lm_head.weight.abs().sum() == 0
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"must be \d+ bytes long, by its header, but is \d+ instead"):
        llama2c.read(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 28, struct.pack("<7i", *[2**30] * 7)])
def test_a_header_that_lies_is_refused(content, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="must be"):
        llama2c.read(tmp_path / "a.bin")
