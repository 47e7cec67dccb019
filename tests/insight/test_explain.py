"""What the explaining page shows is what the model computes, and the page is whole, safe and self-contained."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from triglot.checkpoint import Progress, load_model, save_checkpoint, step_name
from triglot.config import (
    BlockOptions,
    DataConfig,
    ExpertOptions,
    GenerationConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from triglot.errors import ConfigError, DataError
from triglot.generation.alignment import shifted
from triglot.generation.engine import Engine
from triglot.insight.explain import align, explain, merge, words_of
from triglot.layers.masks import create_masks
from triglot.models.factory import build_model
from triglot.tokenizer import SpecialIds, Tokenizer, Tokenizers

LAYERS, HEADS = 3, 2
SOURCE = "one & two </script><script>alert('house')</script> <b>three</b> \u202e"
TARGET = "eins & zwei <img src=x onerror=alert(1)> drei"
EXPERTS = BlockOptions(norm_order="pre", experts=ExpertOptions(num_experts=5, d_ff=11, every=2))


def make_run(folder: Path, kind: str, options: BlockOptions = BlockOptions(), **model) -> Path:
    folder.mkdir(parents=True)
    source = Tokenizer.train("bpe", [SOURCE] * 3, vocab_size=290, tags=["de"] if "tags" in model else [])
    target = source if kind == "decoder_only" else Tokenizer.train("bpe", [TARGET] * 3, vocab_size=280)
    model.pop("tags", None)
    Tokenizers(source, target).save(folder)
    pairs = kind == "encoder_decoder"
    sizes = {"d_model": 14, "num_heads": HEADS, "num_layers": LAYERS, "d_ff": 11, "max_seq_length": 97} | model
    config = RunConfig(
        model=ModelConfig(
            kind=kind,
            vocab_size=target.vocab_size,
            src_vocab_size=source.vocab_size if pairs else 0,
            options=options,
            **sizes,
        ),
        data=DataConfig(kind="phrases" if pairs else "stdlib"),
        train=TrainConfig(context=sizes["max_seq_length"]),
        generation=GenerationConfig(beam=3, max_new_tokens=13),
    )
    torch.manual_seed(0)
    save_checkpoint(folder, step_name(1), config, build_model(config.model), Progress(step=1))
    return folder


class Reader(HTMLParser):
    """Collects elements with their attributes, texts of scripts and styles, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.raw, self.text, self.stack = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.stack, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("script", "style"):
            self.raw.append((self.elements[-1], data))
        else:
            self.text += data

    @property
    def page(self):
        return next(json.loads(data) for (_, attrs), data in self.raw if attrs.get("id") == "data")

    def map(self, name):
        return next(one for one in self.page["maps"] if one["name"] == name)


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("pairs") / "run", "encoder_decoder", EXPERTS)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("texts") / "run", "decoder_only", EXPERTS)


@pytest.fixture(scope="module")
def pages(pair_run, text_run, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("pages")
    explain(pair_run, SOURCE, target=TARGET, out=out / "pair.html")
    explain(text_run, SOURCE, out=out / "text.html")
    return {path.stem: path.read_text(encoding="utf-8") for path in out.iterdir()}


def weights(stored, layer, head):
    values = torch.tensor(stored["layers"][layer][head]) / 1000
    return values.view(len(stored["rows"]), len(stored["columns"]))


def assert_attention(stored, attention):
    assert len(stored["layers"]) == LAYERS
    for layer, expected in enumerate(attention):
        for head in range(HEADS):
            torch.testing.assert_close(weights(stored, layer, head), expected[0, head], atol=5.1e-4, rtol=0)


def assert_experts(stored, routing):
    for layer, one in enumerate(routing):
        for place, token in enumerate(stored["tokens"]):
            chosen = torch.tensor(token["choices"][layer])
            assert chosen[:, 0].tolist() == one.experts[0, place].tolist()
            torch.testing.assert_close(chosen[:, 1], one.weights[0, place], atol=5.1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(stored["load"][layer]), one.load, atol=5.1e-4, rtol=0)
    assert len(stored["layers"]) == len(routing)


def assert_probabilities(stored, logits, ids):
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
    assert [token["loss"] for token in stored] == pytest.approx(nll.tolist(), abs=5.1e-4)
    assert [token["p"] for token in stored] == pytest.approx((-nll).exp().tolist(), rel=5e-3, abs=5e-5)
    for token, row in zip(stored, logits.softmax(-1), strict=True):
        best = row.sort(descending=True).values[:5].tolist()
        assert [p for _, p in token["top"]] == pytest.approx(best, rel=5e-3, abs=5e-5)


@torch.no_grad()
def test_a_text_page_has_the_models_own_numbers(pages, text_run):
    reader, (model, _, tokenizers) = Reader(pages["text"]), load_model(text_run)
    ids = tokenizers.target.encode(SOURCE)
    run = model.run(torch.tensor([ids]), need_weights=True)
    stored = reader.map("Self-attention")
    assert stored["rows"] == stored["columns"] == tokenizers.target.pieces(ids)
    assert_attention(stored, run.self_weights)
    mask = reader.map("Look-ahead mask")
    assert torch.equal(
        torch.tensor(mask["layers"][0][0]).view(len(ids), -1), torch.ones(len(ids), len(ids)).tril().int()
    )
    assert "Filled: may attend" in mask["caption"]
    logits = model(torch.tensor([ids])).logits[0]
    assert_probabilities(reader.page["tokens"][1:], logits[:-1], ids[1:])
    assert reader.page["tokens"][0]["p"] is None
    assert reader.page["next"][0][0] == tokenizers.target.pieces([int(logits[-1].argmax())])[0]
    assert_experts(reader.page["experts"][0], run.routing)


@torch.no_grad()
def test_a_pair_page_has_the_models_own_numbers(pages, pair_run):
    reader, (model, _, tokenizers) = Reader(pages["pair"]), load_model(pair_run)
    src = torch.tensor([[1, *tokenizers.source.encode(SOURCE), 2]])
    ids = tokenizers.target.encode(TARGET)
    tgt = torch.tensor([[1, *ids]])
    masks = create_masks(src, tgt)
    out, run = model(src, tgt, *masks), model.run(src, tgt, *masks, need_weights=True)
    assert_attention(reader.map("Encoder self-attention"), out.enc_attention)
    assert_attention(reader.map("Decoder self-attention"), out.dec_self_attention)
    assert_attention(reader.map("Cross-attention"), out.dec_enc_attention)
    assert_probabilities(reader.page["tokens"], out.logits[0], [*ids, 2])
    encoder, decoder = reader.page["experts"]
    assert_experts(encoder, run.routing[:1])
    assert_experts(decoder, run.routing[1:])
    assert encoder["layers"] == decoder["layers"] == ["Layer 2"]
    assert reader.map("Source padding mask")["layers"] == [[[1] * src.size(1)]]
    stored = reader.map("Look-ahead mask of the target")["layers"][0][0]
    assert torch.equal(torch.tensor(stored).view(tgt.size(1), -1).bool(), masks.tgt_mask[0, 0])


@pytest.mark.parametrize("kind", ["pair", "text"])
def test_all_rows_sum_to_1(pages, kind):
    for stored in Reader(pages[kind]).page["maps"]:
        if stored["kind"] == "attention":
            for layer, heads in enumerate(stored["layers"]):
                for head in range(len(heads)):
                    sums = weights(stored, layer, head).sum(1)
                    assert (sums - 1).abs().max() <= 5.1e-4 * len(stored["columns"])


@pytest.mark.parametrize("kind", ["pair", "text"])
def test_nothing_is_loaded_and_only_the_pages_own_script_may_run(pages, kind):
    reader = Reader(pages[kind])
    assert not {tag for tag, _ in reader.elements} & {"link", "img", "iframe", "object", "embed", "base", "form", "b"}
    for tag, attrs in reader.elements:
        assert not set(attrs) & {"src", "style", "srcset", "action"}, tag
        assert not any(name.startswith("on") for name in attrs), tag
        assert attrs.get("href", "#").startswith("#")
    policy = next(attrs["content"] for _, attrs in reader.elements if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for (tag, attrs), data in reader.raw:
        if attrs.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
            assert not re.search(r"https?:|@import|url\(|innerHTML|eval\(|fetch\(", data)
    assert [tag for tag, _ in reader.elements].count("script") == 2


@pytest.mark.parametrize("kind", ["pair", "text"])
def test_the_tables_are_there_without_a_script(pages, kind):
    reader = Reader(pages[kind])
    assert SOURCE in reader.text
    for token in reader.page["tokens"]:
        assert token["piece"] in reader.text
    assert "noscript" in [tag for tag, _ in reader.elements]
    anchors = {attrs["href"][1:] for tag, attrs in reader.elements if tag == "a"}
    assert anchors == {attrs["id"] for tag, attrs in reader.elements if tag == "section"}


def test_without_a_target_it_is_the_best_one_of_the_beam(pair_run, tmp_path):
    page = Reader(explain(pair_run, SOURCE, out=tmp_path / "deep" / "page.html").read_text(encoding="utf-8")).page
    model, config, tokenizers = load_model(pair_run)
    found = Engine(model, config, tokenizers).translate([SOURCE], beam=3)[0][0]
    tokens = [token for token in found.tokens if token != SpecialIds().eos]
    assert [token["piece"] for token in page["tokens"]] == [*tokenizers.target.pieces(tokens), "<eos>"]


def test_a_target_token_is_aligned_where_it_is_the_decoders_input():
    attention = torch.zeros(HEADS, 4, 5)
    for row, column in enumerate((4, 2, 1, 3)):  # of a source <bos> a b c <eos> and a decoder that reads <bos> x y z
        attention[:, row, column] = 0.75
        attention[:, row, 4] += 0.25
    aligned, apart = shifted(attention, [1, 2, 3])
    assert aligned.argmax(1).tolist() == [1, 0, 2]
    torch.testing.assert_close(aligned.sum(1), torch.ones(3))
    torch.testing.assert_close(apart, torch.full((3,), 0.25))


def test_an_alignment_that_is_all_on_special_tokens_is_zero_and_told():
    attention = torch.zeros(HEADS, 2, 3)
    attention[:, :, 2] = 1.0
    aligned, apart = shifted(attention, [1])
    assert aligned.tolist() == [[0.0]]
    assert apart.tolist() == [1.0]


def test_merging_to_words_keeps_the_sum_of_rows():
    aligned = torch.rand(5, 7).softmax(1)
    merged = merge(aligned, [[0, 1], [2], [3, 4, 5, 6]], [[0], [1, 2, 3], [4]])
    assert merged.shape == (3, 3)
    torch.testing.assert_close(merged.sum(1), torch.ones(3))
    torch.testing.assert_close(merged[1, 0], aligned[1:4, :2].sum() / 3)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize("text", ["one two", " one  two\n", "zwölf, drei", "x", " "])
def test_words_are_what_lies_between_white_space(kind, text):
    tokenizer = Tokenizer.train(kind, ["one two three zwölf"] * 5, vocab_size=270)
    ids = tokenizer.encode(text)
    groups = words_of(tokenizer, ids)
    assert [place for group in groups for place in group] == list(range(len(ids)))
    words = [tokenizer.decode([ids[place] for place in group]).strip() for group in groups]
    assert [word for word in words if word] == text.split()


def test_the_target_tag_is_no_word_of_the_source(tmp_path):
    run = make_run(tmp_path / "run", "encoder_decoder", tags=True)
    page = Reader(explain(run, "one two", target="eins", tag="de", out=tmp_path / "a.html").read_text("utf-8")).page
    cross = next(one for one in page["maps"] if one["name"] == "Cross-attention")
    assert cross["columns"][:2] == ["<2de>", "<bos>"]
    assert next(one for one in page["maps"] if one["name"] == "Alignment of words")["columns"] == ["one", "two"]
    with pytest.raises(DataError, match="tag"):
        explain(run, "one two", target="eins", tag="fr", out=tmp_path / "a.html")


def test_an_empty_target_has_no_alignment(pair_run):
    tokenizers = load_model(pair_run).tokenizers
    assert align([torch.ones(1, HEADS, 1, 3) / 3], tokenizers, [1, 5, 2], []) == ([], None)


def test_forty_tokens_of_four_layers_and_heads_stay_below_a_megabyte(tmp_path):
    run = make_run(tmp_path / "run", "encoder_decoder", d_model=16, num_layers=4, num_heads=4)
    path = explain(run, "one two " * 13, target="eins zwei " * 11, out=tmp_path / "page.html")
    page = Reader(path.read_text(encoding="utf-8")).page
    assert max(len(one["columns"]) for one in page["maps"]) >= 40
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("kind", "text", "given", "error", "message"),
    [
        ("text", "", {}, DataError, "`text` must be no empty one"),
        ("text", "\u20ac" * 40, {}, DataError, "`text` must be at most 97 tokens long"),
        ("text", "one", {"target": "eins"}, ConfigError, "`target` must be left out"),
        ("text", "one", {"tag": "de"}, ConfigError, "`tag` must be left out"),
        ("pair", " ", {}, DataError, "`text` must be no empty one"),
        ("pair", "one", {"tag": "de"}, DataError, "tag"),
        ("pair", "one", {"target": "\u20ac" * 40}, DataError, "`target` must be at most 97 tokens long"),
        ("pair", "\u20ac" * 40, {"target": "eins"}, DataError, "`text` must be at most 97 tokens long"),
    ],
)
def test_refuses_what_the_model_can_not_read_and_writes_nothing(
    pair_run, text_run, tmp_path, kind, text, given, error, message
):
    with pytest.raises(error, match=message):
        explain(pair_run if kind == "pair" else text_run, text, out=tmp_path / "page.html", **given)
    assert not list(tmp_path.iterdir())


def test_refuses_a_text_whose_page_no_browser_would_open(text_run, tmp_path, monkeypatch):
    monkeypatch.setattr("triglot.insight.explain.MOST_WEIGHTS", 100)
    with pytest.raises(DataError, match="short enough for 100 attention weights"):
        explain(text_run, SOURCE, out=tmp_path / "page.html")
