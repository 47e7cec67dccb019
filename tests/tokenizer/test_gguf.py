"""The tokenizer of a GGUF's metadata is the one that `transformers` makes of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.errors import CheckpointError
from triglot.tokenizer import SpecialIds, Tokenizers

mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
SPELLED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<think>",
    "</s>",
    "<0x41>",
    "▁",
    "the dog",
    "  ",
    " 1984",
    "don't",
    "\r\n\n",
]
SENTENCES = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), max_size=9), st.sampled_from(SPELLED)), max_size=5
).map("".join)
SOURCE = Path("model.gguf")


def from_library(folder, pre):
    """Metadata of a byte-level vocabulary, as it is written of a tokenizer.json."""
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"] | {one["content"]: one["id"] for one in values["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {one["content"]: 3 if one["special"] else 4 for one in values["added_tokens"]}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in values["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": kinds and 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    return metadata | ({} if pre is None else {"tokenizer.ggml.pre": pre})


def of_pieces():
    """Metadata of a vocabulary of SentencePiece's, with its scores and without merges."""
    words = ["▁t", "he", "▁the", "▁d", "og", "▁dog", "▁▁", "th", "éé", "▁é"]
    letters = sorted(set("thedogé▁a1,.") - {"X"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }


def theirs_of(metadata):
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    given = {name: metadata[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in metadata}
    return mapping.convert_gguf_tokenizer("llama", given)[0]


@pytest.fixture(scope="module", params=["gpt2", "gpt-2", "llama-bpe", "qwen2", "tekken", "pieces"])
def both(request, family):
    if request.param == "pieces":
        metadata = of_pieces()
    else:
        name = {"llama-bpe": "gpt2", "qwen2": "qwen", "tekken": "gpt2"}.get(request.param, "gpt2")
        metadata = from_library(family(name), None if request.param == "gpt2" else request.param)
    return Tokenizers.from_gguf(metadata, SOURCE).target, theirs_of(metadata)


@settings(deadline=None, max_examples=150)
@given(text=SENTENCES)
def test_ids_and_text_are_those_of_transformers(both, text):
    ours, theirs = both
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_what_the_file_was_made_of_comes_back(family):
    for name, pre in (("gpt2", "gpt-2"), ("qwen", "qwen2")):
        before = Tokenizers.load(family(name)).target
        after = Tokenizers.from_gguf(from_library(family(name), pre), SOURCE).target
        for text in ("the dog, 1984", "déjà vu <think>", "<|endoftext|>你好 🙂\r\n\n  x"):
            assert after.encode(text) == before.encode(text)
        assert after.vocab_size == before.vocab_size


def test_ends_and_beginnings_are_what_the_file_says(family):
    metadata = from_library(family("qwen"), "qwen2") | {"tokenizer.ggml.eot_token_id": 2}
    assert Tokenizers.from_gguf(metadata, SOURCE).target.ids == SpecialIds(bos=None, ends=(0, 2), start=0, banned=())
    tokenizer = Tokenizers.from_gguf(of_pieces(), SOURCE).target
    assert tokenizer.ids == SpecialIds(bos=1, ends=(2,), start=1, banned=())
    assert tokenizer.encode_whole(["dog"]) == [[1, *tokenizer.encode("dog")]]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "dog"}]) == "<s>dog"
    without = Tokenizers.from_gguf(of_pieces() | {"tokenizer.ggml.add_bos_token": False}, SOURCE).target
    assert without.encode_whole(["dog"]) == [tokenizer.encode("dog")]


def test_no_space_comes_first_where_the_file_says_so():
    tokenizer = Tokenizers.from_gguf(of_pieces() | {"tokenizer.ggml.add_space_prefix": False}, SOURCE).target
    assert tokenizer.pieces(tokenizer.encode("dog")) == ["d", "og"]
    assert tokenizer.decode(tokenizer.encode(" dog")) == " dog"


def test_it_travels_as_files(tmp_path):
    tokenizers = Tokenizers.from_gguf(of_pieces(), SOURCE)
    tokenizers.save(tmp_path)
    again = Tokenizers.load(tmp_path)
    assert (again.target.digest, again.target.ids) == (tokenizers.target.digest, tokenizers.target.ids)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"], "scores": [0, 0, 0], "token_type": [1] * 3}, "without doubles"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id"),
        ({"eos_token_id": None}, "eos_token"),
        ({"model": "gpt2", "pre": "klingon"}, "tokenizer.ggml.pre"),
        ({"model": "gpt2", "merges": ["zz z"]}, "tokenizer.ggml.merges"),
    ],
)
def test_metadata_that_do_not_fit_are_named(values, told):
    metadata = of_pieces() | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    with pytest.raises(CheckpointError, match=f"model.gguf: .*{told}"):
        Tokenizers.from_gguf(metadata, SOURCE)
