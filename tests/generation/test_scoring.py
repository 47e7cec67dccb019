"""log p of given texts is that of a plain forward pass, adds up, and does not depend on a text's company."""

import math
import random

import pytest
import torch
from torch import nn

from triglot.config import RunConfig
from triglot.data.corpus import Example
from triglot.errors import ConfigError, DataError
from triglot.evaluation import examples_dataset, text_scores
from triglot.generation.log_probs import Row, log_probs
from triglot.generation.scoring import prompt_ids, score_file, score_pairs, score_texts
from triglot.layers.masks import create_masks
from triglot.models.decoder_only import DecoderLLM
from triglot.models.factory import build_model
from triglot.recipe import from_dict
from triglot.tokenizer import SpecialIds, Tokenizer, Tokenizers

WINDOW, CONTEXT = 61, 13
CORPUS = ["the cat sat on the mat, the dog sat on the log; ein Hund, zwei Katzen, Käse und Brot " * 3]
TOKENIZER = Tokenizer.train("bpe", CORPUS, 293, tags=("de", "fr"))
TOKENIZERS = Tokenizers(TOKENIZER, TOKENIZER)
WORDS = ["the", "cat", "dog", "sat", "on", "mat", "log", "ein", "Hund", "zwei", "Katzen", "Käse", "🙂", "und", ","]
OPTIONS = {
    "pre-learned": {"norm_order": "pre", "positions": "learned"},
    "rotary-grouped": {"norm_order": "pre", "norm": "rms", "positions": "rotary", "num_kv_heads": 1},
    "experts": {"experts": {"num_experts": 5, "top_k": 2}},
}
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


def make(kind: str, options: str = "pre-learned", packing: str = "documents") -> tuple[RunConfig, nn.Module]:
    """A config, and a model with weights large enough for probabilities that differ."""
    size = TOKENIZER.vocab_size
    sources = {"source": "a", "target": "b"} if kind == "encoder_decoder" else {"files": ["a"], "packing": packing}
    values = {
        "model": {
            "kind": kind, "d_model": 20, "num_heads": 2, "num_layers": 2, "d_ff": 31, "max_seq_length": WINDOW,
            "vocab_size": size, "src_vocab_size": size, "options": OPTIONS[options],
        },
        "data": {"kind": "pairs" if kind == "encoder_decoder" else "text", **sources},
        "train": {"context": CONTEXT},
    }  # fmt: skip
    config = from_dict(RunConfig, values)
    torch.manual_seed(3)
    model = build_model(config.model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return config, model.eval()


def some_texts(number: int, seed: int = 0, most: int = 17) -> list[str]:
    choice = random.Random(seed)
    return ["", *(" ".join(choice.choices(WORDS, k=int(most ** choice.random()))) for _ in range(number - 1))]


def log_p(logits: torch.Tensor, wanted: list[int]) -> torch.Tensor:
    """Of plain logits."""
    return -nn.functional.cross_entropy(logits, torch.tensor(wanted, dtype=torch.long), reduction="none").detach()


def in_windows(model: nn.Module, ids: list[int], size: int) -> torch.Tensor:
    """Of all ids but the first."""
    stretches = [ids[at : at + size + 1] for at in range(0, len(ids) - 1, size)]
    return torch.cat([log_p(model(torch.tensor([one[:-1]])).logits[0], one[1:]) for one in stretches])


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("packing", ["documents", "crops"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_text_has_the_log_probs_of_a_plain_forward_pass_after_its_prompt(options, packing, end):
    config, model = make("decoder_only", options, packing)
    texts, prompts = some_texts(11, 1, 9), some_texts(11, 2, 9)[::-1]
    for found, text, prompt in zip(
        score_texts(model, config, TOKENIZER, texts, prompts, end=end), texts, prompts, strict=True
    ):
        before = prompt_ids(config, TOKENIZER, [prompt])[0]
        wanted = TOKENIZER.encode(text, eos=end)
        assert found.tokens == wanted
        assert found.pieces == TOKENIZER.pieces(wanted)
        logits = model(torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1]
        torch.testing.assert_close(torch.tensor(found.log_probs), log_p(logits, wanted), **CLOSE)
        assert not found.truncated


def test_without_a_prompt_the_first_token_comes_after_the_begin_token():
    for packing in ("documents", "crops"):
        config, model = make("decoder_only", packing=packing)
        [found] = score_texts(model, config, TOKENIZER, ["the cat"])
        first = model(torch.tensor([[SpecialIds().start]])).logits[0].log_softmax(-1)[0, found.tokens[0]]
        assert found.log_probs[0] == pytest.approx(first.item(), abs=1e-4)
        assert found == score_texts(model, config, TOKENIZER, ["the cat"], [""])[0]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_target_has_the_log_probs_of_a_plain_forward_pass_given_its_source(options):
    _, model = make("encoder_decoder", options)
    sources, targets, tags = some_texts(11, 1), some_texts(11, 2)[::-1], ["de", "fr", "fr", "de", *["fr"] * 7]
    for found, source, target, tag in zip(
        score_pairs(model, TOKENIZERS, sources, targets, tags), sources, targets, tags, strict=True
    ):
        src = torch.tensor(TOKENIZERS.encode_sources([source], [tag]))
        wanted = TOKENIZER.encode(target, eos=True)
        tgt = torch.tensor([[SpecialIds().start, *wanted[:-1]]])
        expected = log_p(model(src, tgt, *create_masks(src, tgt)).logits[0], wanted)
        torch.testing.assert_close(torch.tensor(found.log_probs), expected, **CLOSE)
        assert found.tokens == wanted
        assert found.log_prob == pytest.approx(expected.sum().item(), abs=1e-3)
        assert found.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_text_is_given_the_same_bits_alone_and_in_any_company(options, batch_tokens):
    texts, others = some_texts(23, 8), some_texts(23, 9)
    order = random.Random(batch_tokens).sample(range(23), 23)
    config, writer = make("decoder_only", options)
    _, translator = make("encoder_decoder", options)

    def scored(rows: list[int], batch_tokens: int) -> list:
        some, more = [texts[row] for row in rows], [others[row] for row in rows]
        return [
            *score_texts(writer, config, TOKENIZER, some, batch_tokens=batch_tokens),
            *score_pairs(translator, TOKENIZERS, some, more, "fr", batch_tokens=batch_tokens),
        ]

    together = scored(order, batch_tokens)
    alone = [scored([row], 10**6) for row in order]
    assert together == [one for one, _ in alone] + [other for _, other in alone]


def test_a_wide_model_gives_a_text_the_same_bits_among_many():
    torch.manual_seed(0)
    model = DecoderLLM(40, 1040, 2, 1, 64, 64).eval()
    draw = torch.Generator().manual_seed(0)
    rows = [Row(ids[:-1], ids[1:]) for ids in torch.randint(40, (9, 60), generator=draw).tolist()]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # who could share a sum
    together = log_probs(model, rows, 10**6)
    alone = [log_probs(model, [row], 10**6)[0] for row in rows]
    torch.set_num_threads(threads)
    assert together == alone


def test_scores_are_the_same_in_training_mode_and_leave_the_model_in_it():
    config, model = make("decoder_only")
    evaluated = score_texts(model, config, TOKENIZER, ["the cat"])
    assert score_texts(model.train(), config, TOKENIZER, ["the cat"]) == evaluated
    assert model.training


def test_a_text_is_as_probable_as_its_parts_each_after_those_before():
    config, model = make("decoder_only")
    parts = ["the cat", " sat on", " the mat"]
    whole = score_texts(model, config, TOKENIZER, ["".join(parts)], end=True)[0]
    before = ["".join(parts[:number]) for number in range(3)]
    apart = score_texts(model, config, TOKENIZER, parts, before)
    apart += score_texts(model, config, TOKENIZER, [""], ["".join(parts)], end=True)
    assert whole.log_prob == pytest.approx(sum(part.log_prob for part in apart), abs=1e-3)


def test_pairs_add_up_to_what_evaluation_reports():
    config, model = make("encoder_decoder")
    sources, targets = some_texts(17, 5), some_texts(17, 6)
    found = score_pairs(model, TOKENIZERS, sources, targets, "de")
    data = examples_dataset([Example(*pair, "de") for pair in zip(sources, targets, strict=True)], TOKENIZERS, config)
    expected = text_scores(model, data, TOKENIZER, torch.device("cpu"))
    assert sum(len(one.tokens) for one in found) == expected["tokens"]
    assert -sum(one.log_prob for one in found) / expected["tokens"] == pytest.approx(expected["loss"], abs=1e-5)


def test_special_tokens_are_part_of_the_distribution():
    config, model = make("decoder_only")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    [found] = score_texts(model, config, TOKENIZER, ["the cat"])
    assert found.perplexity == pytest.approx(TOKENIZER.vocab_size)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\n".join(some_texts(29, 7)).encode())
    return path


def test_a_file_is_its_text_in_windows_side_by_side(path):
    config, model = make("decoder_only", packing="crops")
    text = path.read_text(encoding="utf-8")
    ids = [SpecialIds().start, *TOKENIZER.encode(text)]
    for context in (None, 1, CONTEXT + 2, WINDOW):
        found, size = score_file(model, config, TOKENIZER, path, context=context), context or CONTEXT
        expected = -in_windows(model, ids, size).sum().item()
        assert found.nats == pytest.approx(expected, rel=1e-5)
        assert (found.tokens, found.bytes) == (len(ids) - 1, path.stat().st_size)
        assert found.perplexity == pytest.approx(math.exp(expected / found.tokens), rel=1e-4)
        assert found.bits_per_byte * math.log(2) * found.bytes == pytest.approx(found.nats)
    [scored] = score_texts(model, config, TOKENIZER, [text], past_context="windows")
    assert found.nats == pytest.approx(-scored.log_prob, rel=1e-5)
    assert scored.truncated


def test_past_the_context_a_text_is_scored_in_windows_that_begin_with_its_prompt():
    config, model = make("decoder_only")
    prompt, text = " the cat" * 60, " sat on the mat"
    [found] = score_texts(model, config, TOKENIZER, [text], [prompt], past_context="windows")
    expected = in_windows(model, [SpecialIds().start, *TOKENIZER.encode(prompt + text)], WINDOW)[-len(found.tokens) :]
    torch.testing.assert_close(torch.tensor(found.log_probs), expected, **CLOSE)
    with pytest.raises(DataError, match=r'`text 2` must be at most 61 tokens long .*"windows" goes beyond\), but is'):
        score_texts(model, config, TOKENIZER, ["a", text], ["", prompt])


def test_of_a_side_that_is_too_long_the_beginning_is_scored_and_told():
    _, model = make("encoder_decoder")
    long, short = "the cat " * 80, "ein Hund"
    for source, target in ((long, short), (short, long), (long, long)):
        with pytest.raises(DataError, match=r"`pair 2` must be at most 61 tokens long on either side .*but is \d+ ins"):
            score_pairs(model, TOKENIZERS, [short, source], [short, target], "de")
        one, other = score_pairs(model, TOKENIZERS, [short, source], [short, target], "de", too_long="cut")
        assert (one.truncated, other.truncated) == (False, True)
        assert other.tokens == TOKENIZER.encode(target, eos=True)[:WINDOW]
        kept = TOKENIZER.encode(source)[: WINDOW - 3]
        of_kept = score_pairs(model, TOKENIZERS, [TOKENIZER.decode(kept)], [target], "de", too_long="cut")
        assert other.log_probs == of_kept[0].log_probs


def test_nothing_is_certain_and_has_no_perplexity():
    config, model = make("decoder_only")
    assert score_texts(model, config, TOKENIZER, []) == []
    [nothing] = score_texts(model, config, TOKENIZER, [""])
    assert (nothing.tokens, nothing.log_prob) == ([], 0.0)
    assert math.isnan(nothing.perplexity)


def test_what_can_not_be_scored_is_refused(tmp_path):
    config, writer = make("decoder_only")
    _, translator = make("encoder_decoder")
    with pytest.raises(ConfigError, match="`texts` must be a list of texts, but is 'abc' instead"):
        score_texts(writer, config, TOKENIZER, "abc")
    with pytest.raises(DataError, match=r"`prompts` must be as many as what they belong to \(2\), but is 1 instead"):
        score_texts(writer, config, TOKENIZER, ["a", "b"], ["c"])
    with pytest.raises(DataError, match=r"`targets` must be as many as what they belong to \(1\), but is 2 instead"):
        score_pairs(translator, TOKENIZERS, ["a"], ["b", "c"], "de")
    with pytest.raises(DataError, match="`the target tag` must be one of de, fr, since .* but is None instead"):
        score_pairs(translator, TOKENIZERS, ["a"], ["b"])
    with pytest.raises(DataError, match="`tag` must be a known one"):
        score_pairs(translator, TOKENIZERS, ["a"], ["b"], "cs")
    with pytest.raises(ConfigError, match="`context` must be between 1 and 61, but is 62 instead"):
        score_file(writer, config, TOKENIZER, tmp_path / "none", context=62)
    for content, told in ((b"", "is empty"), (b"\xff", "must be UTF-8")):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(DataError, match=told):
            score_file(writer, config, TOKENIZER, tmp_path / "bad")
