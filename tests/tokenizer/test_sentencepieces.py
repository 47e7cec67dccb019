"""SentencePiece's vocabularies say what its own library and `transformers` make of the same files."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.foreign import sentencepieces
from triglot.errors import CheckpointError
from triglot.tokenizer import SpecialIds, Tokenizers

sentencepiece = pytest.importorskip("sentencepiece")
SPELLED = [
    "</s>",
    "<unk>",
    "<pad>",
    ">>deu<<",
    ">>deu<< the dog",
    "<s>",
    "▁",
    "  ",
    "the dog",
    "\u2581",
    "ﬁ",
    "e\u0301",
]
SENTENCES = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), max_size=9), st.sampled_from(SPELLED)), max_size=5
).map("".join)


@pytest.fixture(scope="module")
def theirs(marian):
    transformers = pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="sacremoses"):
        return transformers.MarianTokenizer.from_pretrained(marian)


@pytest.fixture(scope="module")
def ours(marian):
    return Tokenizers.load(marian)


@settings(deadline=None, max_examples=200)
@given(text=SENTENCES)
def test_sources_and_targets_are_those_of_transformers(ours, theirs, text):
    assert ours.encode_sources([text], [None]) == [theirs(text)["input_ids"]]
    assert [*ours.encode_targets([text])[0], ours.target.ids.eos] == theirs(text_target=text)["input_ids"]


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_text_of_any_ids_is_that_of_transformers(ours, theirs, data):
    ids = data.draw(st.lists(st.integers(0, ours.target.vocab_size - 1), max_size=12))
    text = ours.target.decode(ids)
    assert text == theirs.decode(ids, skip_special_tokens=True)
    stream = ours.target.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_both_sides_share_the_ids_of_vocab_json(ours):
    pad = ours.target.vocab_size - 1
    assert ours.joint
    assert ours.source.ids == ours.target.ids == SpecialIds(bos=None, ends=(0,), start=pad, banned=(pad,))
    assert (ours.generation.beam, ours.generation.max_new_tokens) == (6, 511)


def test_a_vocabulary_for_each_side_is_not_joint(marian, tmp_path):
    folder = tmp_path / "apart"
    shutil.copytree(marian, folder)
    values = json.loads((folder / "vocab.json").read_text())
    target = {piece: len(values) - 1 - token for piece, token in values.items()}
    (folder / "target_vocab.json").write_text(json.dumps(target))
    (folder / "tokenizer_config.json").write_text(json.dumps({"separate_vocabs": True}))
    (folder / "generation_config.json").write_text("{}")
    pair = Tokenizers.load(folder)
    assert not pair.joint
    assert pair.source.encode("the dog") == [len(values) - 1 - token for token in pair.target.encode("the dog")]


def test_the_files_travel(marian, ours, tmp_path):
    ours.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in marian.iterdir()
    }
    assert Tokenizers.load(tmp_path).target.digest == ours.target.digest


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    content = sentencepieces(
        vocab_size=400, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(content)
    return folder


@settings(deadline=None, max_examples=200)
@given(text=SENTENCES)
def test_a_vocabulary_alone_is_that_of_its_own_library(llama, text):
    tokenizer = Tokenizers.load(llama).target
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    plain = all(special not in text for special in ("<s>", "</s>", "<unk>"))
    if plain:
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.encode_whole([text]) == [[model.bos_id(), *model.encode(text)]]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == model.decode([token for token in ids if token > 2])
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_special_ids_of_a_vocabulary_alone_are_its_own(llama):
    assert Tokenizers.load(llama).target.ids == SpecialIds(bos=1, ends=(2,), start=1, banned=())


def test_t5_has_its_blanks_behind_its_vocabulary_the_first_one_last(tmp_path):
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
    (tmp_path / "spiece.model").write_bytes(sentencepieces(vocab_size=90, model_type="unigram", **options))
    (tmp_path / "generation_config.json").write_text('{"decoder_start_token_id": 0, "eos_token_id": 1}')
    tokenizer = Tokenizers.load(tmp_path).target
    size = tokenizer.vocab_size
    ids = tokenizer.encode("the <extra_id_0> dog <extra_id_99>")
    assert [token for token in ids if token >= size - 100] == [size - 1, size - 100]
    assert tokenizer.encode_whole(["the"]) == [[*tokenizer.encode("the"), 1]]
    assert tokenizer.ids == SpecialIds(bos=None, ends=(1,), start=0, banned=())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("source.spm", b"", "`source.spm` must be a vocabulary"),
        ("target.spm", b"\x00\x01rubbish", "target.spm is damaged"),
        ("target.spm", None, "together with target.spm"),
        ("vocab.json", None, "together with vocab.json"),
        ("vocab.json", b"{", "vocab.json is damaged"),
        ("vocab.json", b'{"</s>": 0, "a": 0}', "id 0"),
        ("vocab.json", b'{"</s>": 0, "</s>": 1}', "twice"),
        ("vocab.json", b'{"</s>": -1}', "pieces with their ids"),
        ("vocab.json", b'{"</s>": "0"}', "pieces with their ids"),
        ("vocab.json", b'{"</s>": 0}', "unk_token"),
        ("generation_config.json", b'{"decoder_start_token_id": 5000}', "decoder_start_token_id"),
    ],
)
def test_a_bad_file_is_named(marian, tmp_path, name, content, told):
    folder = tmp_path / "copy"
    shutil.copytree(marian, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"copy: .*{told}"):
        Tokenizers.load(folder)
