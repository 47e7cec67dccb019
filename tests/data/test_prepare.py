"""What holds for a prepared recipe: the parts are apart, the tokenizer has seen one of them, all is accounted for."""

import gzip
import os
from itertools import islice
from pathlib import Path

import pytest
import torch

from triglot.config import RunConfig
from triglot.data import phrases
from triglot.data.batch import IGNORED
from triglot.data.dataset import Crops, Packed, Windows
from triglot.data.phrases import part_of
from triglot.data.prepare import prepare
from triglot.errors import CheckpointError, ConfigError, DataError
from triglot.recipe import from_dict
from triglot.tokenizer import Tokenizer, Tokenizers


def recipe(root: Path, data: dict, *, tokenizer: dict | None = None, max_seq_length: int = 31, **more) -> RunConfig:
    kind = "encoder_decoder" if data["kind"] in ("pairs", "phrases") else "decoder_only"
    model = {"kind": kind, "max_seq_length": max_seq_length, "options": more.pop("options", {})}
    train = {"batch_tokens": 131, "context": 13}
    values = {
        "model": model,
        "data": {"root": str(root), **data},
        "train": train,
        "tokenizer": tokenizer or {"kind": "char"},
    }
    return from_dict(RunConfig, values | more)


def text_of(tokenizers: Tokenizers, tokens) -> list[str]:
    """The documents of a stream."""
    parts = "".join("\x02" if token == 2 else tokenizers.target.decode([token]) for token in tokens.tolist())
    return parts.removesuffix("\x02").split("\x02")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data set"
    folder.mkdir()
    return folder


@pytest.fixture
def lines(root):
    lines = [f"line {number} of a text" for number in range(97)]
    (root / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return lines


@pytest.fixture
def pair_files(root):
    sources = [f"the number {number}" for number in range(97)]
    targets = [f"Zahl {number}" for number in range(97)]
    (root / "en").write_text("\n".join(sources) + "\n", encoding="utf-8")
    (root / "de.gz").write_bytes(gzip.compress(("\n".join(targets) + "\n").encode()))
    return list(zip(sources, targets, strict=True))


TEXT = {"kind": "text", "files": ["text.txt"]}
PAIRS = {"kind": "pairs", "source": "en", "target": "de.gz"}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.05])
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_tail_is_the_last_characters_and_nothing_else(root, tmp_path, kind, fraction):
    text = "Sein oder nicht sein;\nwas — är det för fråga?\n\n" * 23
    (root / "text.txt").write_text(text, encoding="utf-8")
    config = recipe(root, {**TEXT, "valid": fraction, "hold_out": "tail"}, tokenizer={"kind": kind, "vocab_size": 300})
    prepared = prepare(config, tmp_path / "run", None)
    border = int(len(text) * (1 - fraction))
    train, valid = prepared.train.tokens, prepared.valid.tokens
    tokenizer = prepared.tokenizers.target
    assert train.tolist() == tokenizer.encode(text[:border], bos=True)
    assert valid.tolist() == tokenizer.encode(text[border:])


@pytest.mark.parametrize("packing", ["crops", "documents"])
def test_with_a_tail_to_test_on_the_beginning_validates(root, tmp_path, packing):
    text = "Sein oder nicht sein;\nwas — är det för fråga?\n\n" * 23
    (root / "text.txt").write_text(text, encoding="utf-8")
    data = {**TEXT, "valid": 0.125, "test": 0.25, "hold_out": "tail", "packing": packing}
    prepared = prepare(recipe(root, data, tokenizer={"kind": "byte"}), tmp_path / "run", None)
    parts = [
        prepared.tokenizers.target.decode(part.tokens.tolist())
        for part in (prepared.valid, prepared.train, prepared.test)
    ]
    assert "".join(parts) == text
    assert [round(len(part) / len(text), 2) for part in parts] == pytest.approx([0.125, 0.625, 0.25], abs=0.01)


def test_tiny_shakespeare_is_split_as_everyone_splits_it(tmp_path):
    folder = os.environ.get("TRIGLOT_DATA")
    if not folder:
        pytest.skip("TRIGLOT_DATA does not name the data folder")
    data = {"kind": "text", "files": ["input.txt"], "valid": 0.1, "hold_out": "tail"}
    prepared = prepare(recipe(Path(folder) / "tinyshakespeare", data), tmp_path, None)
    assert len(prepared.valid.tokens) == 111_540
    scored = sum(int((batch.targets != IGNORED).sum()) for batch in prepared.valid.epoch(0))
    assert scored == 111_539


@pytest.mark.parametrize("packing", ["crops", "documents"])
def test_the_documents_of_both_parts_are_the_text(root, lines, tmp_path, packing):
    config = recipe(root, {**TEXT, "valid": 0.1, "document": "line", "packing": packing})
    prepared = prepare(config, tmp_path / "run", None)
    parts = [text_of(prepared.tokenizers, part.tokens) for part in (prepared.train, prepared.valid)]
    assert len(parts[1]) == 10
    assert sorted(parts[0] + parts[1]) == sorted(lines)
    assert isinstance(prepared.train, Packed if packing == "documents" else Crops)
    assert isinstance(prepared.valid, Packed if packing == "documents" else Windows)


def test_the_seed_chooses_what_validates(root, lines, tmp_path):
    parts = [
        text_of(prepared.tokenizers, prepared.valid.tokens)
        for run, seed in enumerate((3, 3, 5))
        for prepared in [prepare(recipe(root, {**TEXT, "document": "line"}, seed=seed), tmp_path / str(run), None)]
    ]
    assert parts[0] == parts[1] != parts[2]


def test_a_file_validates(root, lines, tmp_path):
    (root / "other.txt").write_text("line 3 and\n4\n", encoding="utf-8")
    config = recipe(root, {**TEXT, "document": "line", "valid": "oth*.txt"})
    prepared = prepare(config, tmp_path / "run", None)
    assert text_of(prepared.tokenizers, prepared.train.tokens) == lines
    assert text_of(prepared.tokenizers, prepared.valid.tokens) == ["line 3 and", "4"]


@pytest.mark.parametrize("valid", ["other.txt", 0.1])
def test_the_tokenizer_has_not_seen_what_validates(root, tmp_path, valid):
    (root / "text.txt").write_text("abc" * 97 + "é" * 32, encoding="utf-8")
    (root / "other.txt").write_text("é" * 13, encoding="utf-8")
    prepared = prepare(recipe(root, {**TEXT, "valid": valid, "hold_out": "tail"}), tmp_path, None)
    assert ("é" in prepared.tokenizers.target.pieces(range(259, prepared.tokenizers.target.vocab_size))) == (
        valid == "other.txt"
    )


def test_one_document_can_not_be_divided_by_documents(root, tmp_path):
    (root / "text.txt").write_text("abc" * 97, encoding="utf-8")
    with pytest.raises(DataError, match=r'`data\.valid` must be a file, or data\.hold_out "tail", for a text of one'):
        prepare(recipe(root, TEXT), tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_no_more_bytes_are_used_than_asked_for(root, lines, tmp_path):
    config = recipe(root, {**TEXT, "max_bytes": 499, "hold_out": "tail", "valid": 0.5})
    prepared = prepare(config, tmp_path, None)
    both = text_of(prepared.tokenizers, prepared.train.tokens) + text_of(prepared.tokenizers, prepared.valid.tokens)
    assert "".join(both) == "\n".join(lines)[:499]


def test_the_standard_library_is_a_corpus(tmp_path):
    config = recipe(tmp_path, {"kind": "stdlib", "max_bytes": 30_000}, tokenizer={"kind": "bpe", "vocab_size": 499})
    prepared = prepare(config, tmp_path, None)
    assert any("import" in document for document in text_of(prepared.tokenizers, prepared.train.tokens))
    assert "30,000 characters" in prepared.report[0]


@pytest.mark.parametrize("data", [{**TEXT, "document": "line"}, PAIRS, {"kind": "phrases", "num_examples": 97}])
def test_preparing_again_gives_the_same_batches(root, lines, pair_files, tmp_path, monkeypatch, data):
    monkeypatch.setattr("triglot.data.prepare.HELD_OUT_PHRASES", 31)
    config = recipe(root, data, max_seq_length=131)
    first = prepare(config, tmp_path / "run", None)
    for tokenizers in (None, first.tokenizers):
        again = prepare(config, tmp_path / "run", tokenizers)
        assert again.report == first.report
        assert again.valid_examples == first.valid_examples
        for one, other in ((first.train, again.train), (first.valid, again.valid)):
            assert one.num_batches(1) == other.num_batches(1)
            for batch, same in zip(one.epoch(1), other.epoch(1), strict=True):
                assert torch.equal(batch[0], same[0])
                assert torch.equal(batch[1], same[1])


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        ({**TEXT, "document": "line"}, "text.txt", "its text changed"),
        ({**TEXT, "valid": "en"}, "en", "its validation part changed"),
        (PAIRS, "en", "its pairs changed"),
        ({**PAIRS, "valid_source": "en", "valid_target": "other"}, "other", "its validation part changed"),
    ],
)
def test_data_that_changed_under_a_run_is_refused(root, lines, pair_files, tmp_path, data, change, message):
    (root / "other").write_text("x\n" * 97, encoding="utf-8")
    config = recipe(root, data)
    tokenizers = prepare(config, tmp_path / "run", None).tokenizers
    path = root / change
    path.write_text(path.read_text(encoding="utf-8").replace("e", "E", 1).replace("x", "y", 1), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        prepare(config, tmp_path / "run", tokenizers)


def test_another_split_of_the_same_text_is_refused(root, lines, tmp_path):
    data = {**TEXT, "document": "line"}
    tokenizers = prepare(recipe(root, data), tmp_path / "run", None).tokenizers
    for other in (recipe(root, {**data, "valid": 0.2}), recipe(root, data, seed=7)):
        with pytest.raises(DataError, match="its validation part changed"):
            prepare(other, tmp_path / "run", tokenizers)


def test_another_tokenizer_is_refused_for_the_same_run(root, lines, pair_files, tmp_path):
    for name, data in (("text", {**TEXT, "document": "line"}), ("pairs", PAIRS)):
        prepare(recipe(root, data), tmp_path / name, None)
        byte = Tokenizer.train("byte", [])
        with pytest.raises(DataError, match="tokenizer changed"):
            prepare(recipe(root, data), tmp_path / name, Tokenizers(byte, byte))


def scored(dataset) -> int:
    return sum(int((batch.tgt_out != IGNORED).sum()) for batch in dataset.epoch(0))


@pytest.mark.parametrize("hold_out", ["seeded", "tail"])
def test_pairs_are_divided_by_lines(root, pair_files, tmp_path, hold_out):
    prepared = prepare(recipe(root, {**PAIRS, "valid": 0.1, "hold_out": hold_out}), tmp_path, None)
    held = [(one.source, one.target) for one in prepared.valid_examples]
    assert len(held) == 10
    if hold_out == "tail":
        assert held == pair_files[-10:]
    train = [pair for pair in pair_files if pair not in held]
    assert scored(prepared.train) == sum(len(target) + 1 for _, target in train)
    assert scored(prepared.valid) == sum(len(target) + 1 for _, target in held)
    assert prepared.test_examples is None


def test_pairs_validate_and_test_on_files(root, pair_files, tmp_path):
    for name in ("v.en", "v.de", "t.en", "t.de"):
        (root / name).write_text(f"{name} 1\n{name} 2\n", encoding="utf-8")
    names = {"valid_source": "v.en", "valid_target": "v.de", "test_source": "t.en", "test_target": "t.de"}
    prepared = prepare(recipe(root, PAIRS | names), tmp_path, None)
    assert [(one.source, one.target) for one in prepared.valid_examples] == [("v.en 1", "v.de 1"), ("v.en 2", "v.de 2")]
    assert [(one.source, one.target) for one in prepared.test_examples] == [("t.en 1", "t.de 1"), ("t.en 2", "t.de 2")]
    assert scored(prepared.train) == sum(len(target) + 1 for _, target in pair_files)


def test_a_third_column_becomes_a_tag_in_front_of_the_source(root, tmp_path):
    rows = [
        f"dog {number}\t{word} {number}\t{tag}" for number in range(31) for word, tag in (("Hund", "de"), ("pes", "cs"))
    ]
    (root / "train.tsv").write_text("\n".join(rows), encoding="utf-8")
    (root / "valid.tsv").write_text("dog\tHund\tde\n", encoding="utf-8")
    data = {"kind": "pairs", "files": ["train.tsv"], "valid": "valid.tsv"}
    prepared = prepare(recipe(root, data), tmp_path / "run", None)
    tokenizer = prepared.tokenizers.source
    assert tokenizer.tags == ("cs", "de")
    (batch,) = prepared.valid.epoch(0)
    assert batch.src.tolist() == [[tokenizer.tag_id("de"), 1, *tokenizer.encode("dog"), 2]]
    (root / "valid.tsv").write_text("dog\tchien\tfr\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"`tag` must be a known one \(cs, de\), but is 'fr'"):
        prepare(recipe(root, data), tmp_path / "other", None)
    plain = Tokenizer.train("char", ["dog"])
    with pytest.raises(DataError, match=r"`tag` must be a known one \(none, since"):
        prepare(recipe(root, data), tmp_path / "another", Tokenizers(plain, plain))


def test_what_is_left_out_is_counted_by_reason(root, tmp_path):
    rows = ["a\tb", "\tb", "a" * 30 + "\tb", "a\t" + "b" * 31, "a\t" + "b" * 30]
    (root / "train.tsv").write_text("\n".join(rows), encoding="utf-8")
    (root / "valid.tsv").write_text("a" * 29 + "\tb\na\t\n", encoding="utf-8")
    data = {"kind": "pairs", "files": ["train.tsv"], "valid": "valid.tsv"}
    prepared = prepare(recipe(root, data), tmp_path, None)
    assert prepared.report[1:] == [
        "train: 2 pairs, 31 target tokens; left out: 1 empty on a side, 2 longer than 31 tokens",
        "valid: 1 pair, 1 target token; left out: 1 empty on a side",
    ]
    assert [one.source for one in prepared.valid_examples] == ["a" * 29]
    assert max(batch.src.shape[1] for batch in prepared.valid.epoch(0)) == 31
    assert max(batch.tgt_in.shape[1] for batch in prepared.train.epoch(0)) == 31


def test_pairs_that_are_all_too_long_are_refused(root, tmp_path):
    (root / "train.tsv").write_text(("a" * 97 + "\tb\n") * 13, encoding="utf-8")
    with pytest.raises(
        DataError, match="`the train data` must be pairs that can be used, but is 'none; left out: 12 longer"
    ):
        prepare(recipe(root, {"kind": "pairs", "files": ["train.tsv"]}), tmp_path, None)


def test_each_side_can_have_its_own_tokenizer(root, pair_files, tmp_path):
    prepared = prepare(recipe(root, PAIRS, tokenizer={"kind": "char", "joint": False}), tmp_path, None)
    source, target = prepared.tokenizers
    assert not prepared.tokenizers.joint
    assert "Z" not in source.pieces(range(259, source.vocab_size))
    assert "b" not in target.pieces(range(259, target.vocab_size))


def test_a_tokenizer_that_exists_is_used_as_it_is(root, lines, pair_files, tmp_path):
    tokenizer = Tokenizer.train("bpe", [" the number text"] * 7, 277)
    tokenizer.save(tmp_path / "tokenizer.json")
    for data in ({**TEXT, "document": "line"}, PAIRS):
        config = recipe(root, data, tokenizer={"path": str(tmp_path)})
        assert prepare(config, tmp_path / data["kind"], None).tokenizers.target.digest == tokenizer.digest
    with pytest.raises(CheckpointError, match="`tokenizer` must be"):
        prepare(recipe(root, PAIRS, tokenizer={"path": str(root)}), tmp_path / "run", None)


def test_tied_embeddings_need_one_tokenizer(root, pair_files, tmp_path):
    two = Tokenizers(Tokenizer.train("byte", []), Tokenizer.train("byte", []))
    config = recipe(root, PAIRS, options={"tie_embeddings": True})
    with pytest.raises(ConfigError, match="`tokenizers` must be joint"):
        prepare(config, tmp_path / "run", two)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**PAIRS, "source": "text.txt"}, r"text\.txt has 3 and .*de\.gz has 97"),
        ({**PAIRS, "source": "absent"}, r"`data\.source` must be"),
        ({**PAIRS, "valid_source": "en", "valid_target": "text.txt"}, r"en has 97 and .*text\.txt has 3"),
        ({**PAIRS, "valid": "absent.tsv"}, r"`data\.valid` must be"),
        ({**PAIRS, "test_source": "en", "test_target": "absent"}, r"`data\.test_target` must be"),
        ({"kind": "pairs", "files": ["absent"]}, r"`data\.files` must be"),
        ({"kind": "pairs", "files": ["en"]}, r"en:1: a line must have 2 or 3 columns"),
        ({**TEXT, "valid": "absent"}, r"`data\.valid` must be"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_made(root, pair_files, tmp_path, monkeypatch, data, message):
    (root / "text.txt").write_text("a\nb\nc\n", encoding="utf-8")
    monkeypatch.setattr(Tokenizer, "train", None)
    with pytest.raises(DataError, match=message):
        prepare(recipe(root, data), tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_phrases_are_held_out_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr("triglot.data.prepare.TOKENIZER_PHRASES", 997)
    data = {"kind": "phrases", "num_examples": 499, "language": "fr"}
    prepared = prepare(recipe(tmp_path, data, max_seq_length=131, seed=7), tmp_path / "run", None)
    assert len({one.source for one in prepared.valid_examples}) == 500 == len(prepared.valid_examples)
    assert {part_of(one.source) for one in prepared.valid_examples} == {"valid"}
    assert {part_of(one.source) for one in prepared.test_examples} == {"test"}
    for epoch in (0, 2):
        wanted = islice(phrases.examples(7, "fr", "train", start=499 * epoch), 499)
        ends = [
            prepared.tokenizers.target.decode([token for token in row if token > 2])
            for batch in prepared.train.epoch(epoch)
            for row in batch.tgt_in.tolist()
        ]
        assert sorted(ends) == sorted(one.target for one in wanted)
