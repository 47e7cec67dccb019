"""Search over a toy that knows the probability of every text: greedy, sampled, beam; alone and in company."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Decoded, Steps, beam_search, generate, normalised, stream
from triglot.errors import CheckpointError, ConfigError

PAD, BOS, EOS = 0, 1, 2
BANNED = (PAD, BOS)
GREEDY = Sampler(temperature=0.0)
VOCAB = 7


class Table:
    """An n-gram model: the logits after two tokens, a table for each sentence. It counts what it is asked."""

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables  # [sentences, vocab, vocab, vocab]
        self.row_of = torch.arange(len(tables))
        self.context = torch.full((len(tables), 2), BOS)
        self.rows_seen: list[int] = []

    def logits(self) -> Tensor:
        return self.tables[self.row_of, self.context[:, 0], self.context[:, 1]]

    def step(self, tokens: Tensor) -> Tensor:
        self.rows_seen.append(len(tokens))
        self.context = torch.stack([self.context[:, 1], tokens], 1)
        return self.logits()

    def select(self, rows: Tensor) -> None:
        self.row_of, self.context = self.row_of[rows], self.context[rows]


def tables(sentences: int, seed: int, end: float = 0.0, vocab: int = VOCAB) -> Tensor:
    """Random tables; `end` makes the end token more likely everywhere."""
    made = torch.randn(sentences, vocab, vocab, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    made[..., EOS] += end
    return made


def log_prob(table: Tensor, ids: list[int], banned: tuple[int, ...] = BANNED) -> float:
    """Σ log p of a text, token by token."""
    total, context = 0.0, (BOS, BOS)
    for token in ids:
        logits = table[context].double().clone()
        logits[list(banned)] = -math.inf
        total += logits.log_softmax(0)[token].item()
        context = (context[1], token)
    return total


def greedy(table: Tensor, limit: int) -> list[int]:
    """The plainest loop there is."""
    ids, context = [], (BOS, BOS)
    while len(ids) < limit and ids[-1:] != [EOS]:
        logits = table[context].clone()
        logits[list(BANNED)] = -math.inf
        ids.append(int(logits.argmax()))
        context = (context[1], ids[-1])
    return ids


def run_beam(made: Tensor, beam: int, limit: int | list[int], **options) -> list[list[Decoded]]:
    steps = Table(made)
    options = {"banned": BANNED, **options}
    return beam_search(steps.logits(), steps, beam=beam, max_new_tokens=limit, eos_id=EOS, **options)


def run(made: Tensor, sampler: Sampler, limit: int | list[int], **options) -> list[Decoded]:
    steps = Table(made)
    return generate(steps.logits(), steps, sampler, limit, eos_id=EOS, banned=BANNED, **options)


def test_the_toy_is_what_search_asks_for():
    assert isinstance(Table(tables(1, 0)), Steps)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.lists(st.integers(0, 11), min_size=1, max_size=5))
def test_greedy_is_the_plain_loop_for_each_row_and_its_own_limit(seed, limits):
    made = tables(len(limits), seed)
    for table, limit, result in zip(made, limits, run(made, GREEDY, limits), strict=True):
        assert result.ids == greedy(table, limit)
        assert result.truncated == (result.ids[-1:] != [EOS])
        assert result.log_prob == pytest.approx(log_prob(table, result.ids), abs=1e-4)


def test_finished_rows_leave_the_batch_and_no_step_is_wasted():
    made = tables(13, 5)
    steps = Table(made)
    results = generate(steps.logits(), steps, GREEDY, 11, eos_id=EOS, banned=BANNED)
    lengths = [len(result.ids) for result in results]
    assert len(set(lengths)) > 2
    expected = [sum(length > step for length in lengths) for step in range(1, 11)]
    assert steps.rows_seen == [rows for rows in expected if rows]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 5))
def test_a_stream_is_the_batch_told_step_by_step(seed, rows):
    made = tables(rows, seed)
    steps = Table(made)
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    tokens = list(stream(steps.logits(), steps, Sampler(), 7, eos_id=EOS, banned=BANNED, generator=generators))
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    results = run(made, Sampler(), 7, generator=generators)
    for row, result in enumerate(results):
        mine = [token for token in tokens if token.row == row]
        assert [token.id for token in mine] == result.ids
        assert sum(token.log_prob for token in mine) == result.log_prob


def test_a_sampled_row_does_not_depend_on_its_mates():
    made = tables(5, 11)

    def generators(rows):
        return [torch.Generator().manual_seed(row) for row in rows]

    together = run(made, Sampler(temperature=1.3), 9, generator=generators(range(5)))
    alone = [run(made[[r]], Sampler(temperature=1.3), 9, generator=generators([r]))[0] for r in range(5)]
    assert [one.ids for one in together] == [one.ids for one in alone]


def test_samples_follow_the_models_probabilities():
    table = tables(1, 3, vocab=5)[0] / 2
    rows, limit = 20_000, 3
    results = run(table.expand(rows, *table.shape), Sampler(), limit, generator=torch.Generator().manual_seed(0))
    counts: dict[tuple[int, ...], int] = {}
    for result in results:
        counts[tuple(result.ids)] = counts.get(tuple(result.ids), 0) + 1
        assert not set(result.ids) & set(BANNED)
    texts = all_texts(5, limit)
    expected = {ids: rows * math.exp(log_prob(table, list(ids))) for ids in texts}
    assert sum(expected.values()) == pytest.approx(rows, rel=1e-4)
    likely = [ids for ids in texts if expected[ids] >= 5]
    chi_square = sum((counts.get(ids, 0) - expected[ids]) ** 2 / expected[ids] for ids in likely)
    spread = math.sqrt(2 * len(likely))
    assert chi_square < len(likely) + 4 * spread


def all_texts(vocab: int, limit: int) -> list[tuple[int, ...]]:
    """Every text of tokens that are not banned that ends with EOS, or is cut at `limit`."""
    words = range(EOS + 1, vocab)
    ended = [(*text, EOS) for n in range(limit) for text in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=limit))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.6, 1.0, 2.0]))
def test_a_beam_as_wide_as_all_texts_finds_the_best_of_them(seed, alpha):
    vocab, limit, nbest = 5, 4, 5
    table = tables(1, seed, vocab=vocab)[0]
    found = run_beam(table[None], beam=3**limit, limit=limit, length_penalty=alpha, nbest=nbest)[0]
    texts = [list(text) for text in all_texts(vocab, limit) if text[-1] == EOS]
    exact = sorted((normalised(log_prob(table, text), len(text), alpha) for text in texts), reverse=True)
    assert [one.score(alpha) for one in found] == pytest.approx(exact[:nbest], abs=1e-4)
    for one in found:
        assert not one.truncated
        assert one.log_prob == pytest.approx(log_prob(table, one.ids), abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.sampled_from([0.0, 1.0]), st.sampled_from([-2.0, 0.0, 4.0]))
def test_a_beam_of_one_is_greedy(seed, alpha, end):
    made = tables(3, seed, end)
    beams = run_beam(made, 1, 11, length_penalty=alpha)
    for [best], expected in zip(beams, run(made, GREEDY, 11), strict=True):
        assert best.ids == expected.ids
        assert best.truncated == expected.truncated
        assert best.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from([0.0, 0.6, 1.0]), st.data())
def test_a_sentence_alone_is_the_sentence_in_company(seed, beam, alpha, data):
    made, limits = tables(5, seed, 1.0), data.draw(st.lists(st.integers(1, 13), min_size=5, max_size=5))
    options = {"length_penalty": alpha, "nbest": data.draw(st.integers(1, beam))}
    together = run_beam(made, beam, limits, **options)
    for row in range(5):
        assert run_beam(made[[row]], beam, limits[row], **options) == [together[row]]


def unhurried(table: Tensor, beam: int, limit: int, alpha: float) -> list[tuple[float, list[int]]]:
    """Beam search in lists, which never stops early: every finished text, best first."""
    live, pool = [(0.0, [])], []
    for _ in range(limit):
        grown = [
            (log_prob(table, [*ids, token]), [*ids, token]) for _, ids in live for token in range(VOCAB) if token > BOS
        ]
        candidates = sorted(grown, key=lambda one: -one[0])[: 2 * beam]
        pool += [(normalised(p, len(ids), alpha), ids) for p, ids in candidates[:beam] if ids[-1] == EOS]
        live = [one for one in candidates if one[1][-1] != EOS][:beam]
    return sorted(pool, reverse=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(2, 5), st.sampled_from([0.0, 0.6, 1.0]))
def test_stopping_early_changes_no_result(seed, beam, alpha):
    made = tables(1, seed, 1.0)
    found = run_beam(made, beam, 11, length_penalty=alpha, nbest=2)[0]
    expected = unhurried(made[0], beam, 11, alpha)[:2]
    assert [one.ids for one in found if not one.truncated] == [ids for _, ids in expected]


def test_a_finished_sentence_leaves_the_batch():
    made, limit = tables(5, 1, -1.0), 11

    def rows_seen(made: Tensor) -> list[int]:
        steps = Table(made)
        beam_search(steps.logits(), steps, beam=2, max_new_tokens=limit, eos_id=EOS, length_penalty=0.0, banned=BANNED)
        return steps.rows_seen

    alone = [rows_seen(made[[row]]) for row in range(5)]
    assert len({len(rows) for rows in alone}) > 2
    assert rows_seen(made) == [sum(rows) for rows in itertools.zip_longest(*alone, fillvalue=0)]


def test_what_does_not_end_in_time_is_returned_and_marked():
    made = tables(2, 4)
    made[..., EOS] = -1e9
    for best, second in run_beam(made, 3, 5, nbest=2):
        assert best.truncated
        assert second.truncated
        assert len(best.ids) == len(second.ids) == 5
        assert best.log_prob >= second.log_prob


def test_finished_texts_come_before_those_that_are_cut():
    made = tables(1, 8)
    made[..., EOS] = -4.0
    results = run_beam(made, 5, 3, nbest=5)[0]
    cut = [one.truncated for one in results]
    assert cut == sorted(cut)
    assert {False, True} == set(cut)


def test_equal_scores_go_to_the_lower_ids():
    results = run_beam(torch.zeros(1, VOCAB, VOCAB, VOCAB), 3, 2, nbest=3)[0]
    assert [one.ids for one in results] == [[2], [3, 2], [3, 3]]


def test_banned_ids_never_come_and_take_no_probability():
    made = tables(3, 9)
    made[..., :2] = 50.0
    for [best], table in zip(run_beam(made, 4, 7), made, strict=True):
        assert not set(best.ids) & set(BANNED)
        assert best.log_prob == pytest.approx(log_prob(table, best.ids), abs=1e-4)


def test_more_texts_than_there_are_is_not_an_error():
    made = tables(1, 2, vocab=3)
    [results] = run_beam(made, 4, 1, nbest=4)
    assert [one.ids for one in results] == [[EOS]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "`beam` must be at least 1, but is 0 instead."),
        ({"beam": 2, "nbest": 3}, "`nbest` must be between 1 and beam (2), but is 3 instead."),
        ({"beam": 2, "length_penalty": -1.0}, "`length_penalty` must be at least 0, but is -1.0 instead."),
        ({"beam": 2, "limit": 0}, "`max_new_tokens` must be at least 1, but is 0 instead."),
    ],
)
def test_refuses_a_search_that_makes_no_sense(options, message):
    with pytest.raises(ConfigError) as refusal:
        run_beam(tables(1, 0), **{"limit": 5, **options})
    assert str(refusal.value) == message


@pytest.mark.parametrize("search", [lambda made: run(made, GREEDY, 3), lambda made: run_beam(made, 2, 3)])
def test_a_model_of_nan_is_an_error_and_not_a_text(search):
    made = tables(2, 0)
    made[1, ..., 3] = math.nan
    with pytest.raises(CheckpointError, match="`logits` must be numbers"):
        search(made)


def more_end(prefix: Tensor, logits: Tensor) -> Tensor:
    """The end token becomes likelier with every token, so that texts have lengths between 1 and the limit."""
    return logits.index_add(1, torch.tensor([EOS]), torch.full((len(logits), 1), float(prefix.size(1))))


class Marian:
    """A transformers encoder–decoder as `Steps`: uncached, the whole prefix again for every token."""

    def __init__(self, model, src: Tensor, mask: Tensor) -> None:
        self.model, self.mask = model, mask
        self.memory = model.get_encoder()(src, attention_mask=mask).last_hidden_state
        self.prefix = torch.empty(len(src), 0, dtype=torch.long)

    def step(self, tokens: Tensor) -> Tensor:
        self.prefix = torch.cat([self.prefix, tokens[:, None]], 1)
        out = self.model(
            encoder_outputs=(self.memory,), attention_mask=self.mask, decoder_input_ids=self.prefix, use_cache=False
        )
        return more_end(self.prefix, out.logits[:, -1])

    def select(self, rows: Tensor) -> None:
        self.memory, self.mask, self.prefix = self.memory[rows], self.mask[rows], self.prefix[rows]


@pytest.fixture(scope="module")
def marian():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS}
    config = transformers.MarianConfig(
        vocab_size=23,
        d_model=22,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_position_embeddings=41,
        init_std=0.4,
        **sizes,
        **ids,
    )
    return transformers.MarianMTModel(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [2, 5])
def test_equals_the_beam_search_of_transformers(marian, alpha, beam):
    src = torch.randint(3, 23, (7, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(src)
    mask[1, 5:] = mask[4, 3:] = 0
    src = src * mask
    limit = 13
    theirs = marian.generate(
        input_ids=src,
        attention_mask=mask,
        num_beams=beam,
        num_return_sequences=2,
        length_penalty=alpha,
        early_stopping="never",
        do_sample=False,
        max_new_tokens=limit,
        bad_words_ids=[[BOS], [PAD]],
        logits_processor=[more_end],
        renormalize_logits=True,
        forced_eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    steps = Marian(marian, src, mask)
    first = steps.step(torch.full((len(src),), BOS))
    ours = beam_search(
        first, steps, beam=beam, max_new_tokens=limit, eos_id=EOS, length_penalty=alpha, nbest=2, banned=BANNED
    )
    assert (theirs.sequences == EOS).any(1).all()  # texts cut at the limit they rank among the finished, we after them
    for row, texts in enumerate(ours):
        for rank, text in enumerate(texts):
            ids = theirs.sequences[2 * row + rank, 1:].tolist()
            assert text.ids == ids[: ids.index(EOS) + 1]
            assert text.score(alpha) == pytest.approx(theirs.sequences_scores[2 * row + rank].item(), abs=1e-4)
    assert len({len(text.ids) for texts in ours for text in texts}) > 2
