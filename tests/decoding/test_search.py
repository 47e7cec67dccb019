"""Search over a toy that knows the probability of every text: greedy, sampled, beam; alone and in company."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from triglot.decoding.beam import BeamSearch, beam_search
from triglot.decoding.logits import Scored
from triglot.decoding.rules import MinLength
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Chooser, Decoded, Steps, closed_up, generate, stream
from triglot.errors import CheckpointError, ConfigError

PAD, BOS, EOS = 0, 1, 2
BANNED = (PAD, BOS)
GREEDY = Sampler(temperature=0.0)
VOCAB = 7
LENGTHS = st.sampled_from(["power", "gnmt"])


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


def distributions(table: Tensor, ids: list[int]) -> list[list[float]]:
    """log p of everything at each place of a text."""
    found, context = [], (BOS, BOS)
    for token in ids:
        logits = table[context].double().clone()
        logits[list(BANNED)] = -math.inf
        found.append(logits.log_softmax(0).tolist())
        context = (context[1], token)
    return found


def log_probs(table: Tensor, ids: list[int]) -> list[float]:
    return [of[token] for of, token in zip(distributions(table, ids), ids, strict=True)]


def log_prob(table: Tensor, ids: list[int]) -> float:
    return sum(log_probs(table, ids))


def score(log_prob: float, n: int, alpha: float, lengths: str) -> float:
    return log_prob / (n**alpha if lengths == "power" else ((5 + n) / 6) ** alpha)


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
    return beam_search(steps.logits(), steps, BeamSearch(beam=beam, eos_ids=[EOS], **options), limit)


def run(made: Tensor, sampler: Sampler, limit: int | list[int], **options) -> list[Decoded]:
    steps = Table(made)
    return generate(steps.logits(), steps, sampler, limit, eos_ids=[EOS], banned=BANNED, **options)


def test_the_toy_is_what_search_asks_for():
    assert isinstance(Table(tables(1, 0)), Steps)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.lists(st.integers(0, 11), min_size=1, max_size=5))
def test_greedy_is_the_plain_loop_for_each_row_and_its_own_limit(seed, limits):
    made = tables(len(limits), seed)
    for table, limit, result in zip(made, limits, run(made, GREEDY, limits), strict=True):
        assert result.ids == greedy(table, limit)
        assert result.truncated == (result.ids[-1:] != [EOS])
        assert result.log_probs == pytest.approx(log_probs(table, result.ids), abs=1e-4)
        assert result.log_prob == pytest.approx(log_prob(table, result.ids), abs=1e-4)


def test_finished_rows_leave_the_batch_and_no_step_is_wasted():
    made = tables(13, 5)
    steps = Table(made)
    results = generate(steps.logits(), steps, GREEDY, 11, eos_ids=[EOS], banned=BANNED)
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
    tokens = list(stream(steps.logits(), steps, Sampler(), 7, eos_ids=[EOS], banned=BANNED, generator=generators))
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    results = run(made, Sampler(), 7, generator=generators)
    for row, result in enumerate(results):
        mine = [token for token in tokens if token.row == row]
        assert [token.id for token in mine] == result.ids
        assert sum(token.log_prob for token in mine) == result.log_prob


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(0, 9))
def test_alternatives_are_the_likeliest_tokens_before_temperature_and_cuts(seed, rows, count):
    made = tables(rows, seed)

    def run(**options):
        steps, generator = Table(made), torch.Generator().manual_seed(seed)
        sampler = Sampler(temperature=2.0, top_k=3)
        return list(
            stream(steps.logits(), steps, sampler, 7, eos_ids=[EOS], banned=BANNED, generator=generator, **options)
        )

    told = run(top_logprobs=count)
    assert [token._replace(alternatives=()) for token in told] == run()
    for row, table in enumerate(made):
        mine = [token for token in told if token.row == row]
        for token, expected in zip(mine, distributions(table, [token.id for token in mine]), strict=True):
            best = sorted((-value, id) for id, value in enumerate(expected) if value > -math.inf)[:count]
            assert [id for id, _ in token.alternatives] == [id for _, id in best]
            assert [value for _, value in token.alternatives] == pytest.approx([-value for value, _ in best], abs=1e-4)
            assert dict(token.alternatives).get(token.id, token.log_prob) == token.log_prob


class Ahead(Table):
    """Steps that begin before the last tokens are known, and write what they find over what the last one found."""

    ahead = True

    def __init__(self, tables: Tensor) -> None:
        super().__init__(tables)
        self.memory = [torch.empty(len(tables), *size) for size in ((tables.size(-1),), (), (1,))]

    def scored(self, logits: Tensor) -> Scored:
        logits[:, list(BANNED)] = -torch.inf
        best, normaliser = logits.argmax(1), logits.logsumexp(1, keepdim=True)
        rows, (of_logits, of_best, of_normaliser) = slice(0, len(logits)), self.memory
        of_logits[rows], of_best[rows], of_normaliser[rows] = logits, best.float(), normaliser
        return Scored(of_logits[rows], of_best[rows].long(), of_normaliser[rows])

    def step(self, tokens: Tensor) -> Scored:
        return self.scored(super().step(tokens))


@pytest.mark.parametrize("sampler", [GREEDY, Sampler()])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), limits=st.lists(st.integers(0, 11), min_size=1, max_size=5), stop=st.integers(0, 9))
def test_steps_that_begin_ahead_find_the_same_tokens(sampler, seed, limits, stop):
    made = tables(len(limits), seed)

    def told(steps, first, **options):
        stopped, found = set[int](), []
        draws = [torch.Generator().manual_seed(seed + row) for row in range(len(limits))]
        for token in stream(first, steps, sampler, limits, eos_ids=[EOS], generator=draws, stopped=stopped, **options):
            found.append(token)
            if len(found) == stop:
                stopped.add(token.row)
        return found

    plain, ahead = Table(made), Ahead(made)
    expected = told(plain, plain.logits(), banned=BANNED)
    found = told(ahead, ahead.scored(ahead.logits().clone()))
    assert [token[:2] for token in found] == [token[:2] for token in expected]
    assert [one.log_prob for one in found] == pytest.approx([one.log_prob for one in expected], abs=1e-5)
    assert len(ahead.rows_seen) <= len(plain.rows_seen) + 1


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
@given(st.integers(0, 999), st.sampled_from([0.0, 0.6, 1.0, 2.0]), LENGTHS)
def test_a_beam_as_wide_as_all_texts_finds_the_best_of_them(seed, alpha, lengths):
    vocab, limit, nbest = 5, 4, 5
    table = tables(1, seed, vocab=vocab)[0]
    options = {"length_penalty": alpha, "lengths": lengths}
    found = run_beam(table[None], beam=3**limit, limit=limit, nbest=nbest, **options)[0]
    texts = [list(text) for text in all_texts(vocab, limit) if text[-1] == EOS]
    exact = sorted((score(log_prob(table, text), len(text), alpha, lengths) for text in texts), reverse=True)
    assert [one.score(alpha, lengths) for one in found] == pytest.approx(exact[:nbest], abs=1e-4)
    for one in found:
        assert not one.truncated
        assert one.log_probs == pytest.approx(log_probs(table, one.ids), abs=1e-4)


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


def unhurried(table: Tensor, beam: int, limit: int, alpha: float, lengths: str, enough: float = math.inf):
    """Beam search in lists, which goes on until `enough` texts have finished: scores and texts, best first."""
    live, pool = [(0.0, [])], []
    for _ in range(limit):
        grown = [
            (log_prob(table, [*ids, token]), [*ids, token]) for _, ids in live for token in range(VOCAB) if token > BOS
        ]
        candidates = sorted(grown, key=lambda one: -one[0])[: 2 * beam]
        pool += [(score(p, len(ids), alpha, lengths), ids) for p, ids in candidates[:beam] if ids[-1] == EOS]
        live = [one for one in candidates if one[1][-1] != EOS][:beam]
        if len(pool) >= enough:
            break
    return sorted(pool, reverse=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(2, 5), st.sampled_from([0.0, 0.6, 1.0]), LENGTHS)
def test_stopping_early_changes_no_result(seed, beam, alpha, lengths):
    made = tables(1, seed, 1.0)
    found = run_beam(made, beam, 11, length_penalty=alpha, lengths=lengths, nbest=2)[0]
    expected = unhurried(made[0], beam, 11, alpha, lengths)[:2]
    assert_as_good(found, expected, alpha, lengths)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from([0.1, 0.7, 1.0, 2.0, 1e9]), LENGTHS, st.data())
def test_patience_waits_for_so_many_texts_and_never_for_fewer_than_are_asked_for(seed, beam, patience, lengths, data):
    made, nbest = tables(1, seed, 1.0), data.draw(st.integers(1, beam))
    found = run_beam(made, beam, 11, length_penalty=2.0, lengths=lengths, nbest=nbest, patience=patience)[0]
    expected = unhurried(made[0], beam, 11, 2.0, lengths, max(nbest, beam * patience))[:nbest]
    assert_as_good(found, expected, 2.0, lengths)


def assert_as_good(found: list[Decoded], expected: list[tuple[float, list[int]]], alpha: float, lengths: str) -> None:
    """The same scores: two texts of the same steps in another order are as probable, and either may come first."""
    finished = [one.score(alpha, lengths) for one in found if not one.truncated]
    assert finished == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_a_finished_sentence_leaves_the_batch():
    made, limit = tables(5, 1, -1.0), 11

    def rows_seen(made: Tensor) -> list[int]:
        steps = Table(made)
        beam_search(steps.logits(), steps, BeamSearch(beam=2, eos_ids=[EOS], length_penalty=0.0, banned=BANNED), limit)
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
        ({"beam": 2, "length_penalty": -1.0}, "`length_penalty` must be at least 0 and finite, but is -1.0 instead."),
        ({"beam": 2, "patience": 0.0}, "`patience` must be above 0, or left out, but is 0.0 instead."),
        ({"beam": 2, "lengths": "mean"}, "`lengths` must be power or gnmt, but is 'mean' instead."),
        ({"beam": 2, "limit": 0}, "`max_new_tokens` must be at least 1, but is 0 instead."),
    ],
)
def test_refuses_a_search_that_makes_no_sense(options, message, without_shape_checks):
    with pytest.raises(ConfigError) as refusal:
        run_beam(tables(1, 0), **{"limit": 5, **options})
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "search",
    [
        lambda made: run(made, GREEDY, 3),
        lambda made: run_beam(made, 2, 3),
        lambda made: run_beam(made, 2, 3, banned=[BOS], rules=[MinLength([EOS], 1)]),
    ],
)
def test_a_model_of_nan_is_an_error_and_not_a_text(search):
    made = tables(2, 0)
    made[1, ..., 3] = math.nan
    with pytest.raises(CheckpointError, match="`logits` must be numbers"):
        search(made)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=20))
def test_who_goes_on_closes_up_and_only_the_last_ones_move(goes_on):
    kept = closed_up(goes_on)
    assert sorted(kept) == [place for place, goes in enumerate(goes_on) if goes]
    assert all(new == old or old >= len(kept) for new, old in enumerate(kept))


@pytest.mark.parametrize("changes", [{}, {"top_logprobs": 2}, {"banned": [1]}, {"rules": [MinLength([EOS], 1)]}])
@pytest.mark.parametrize("sampler", [GREEDY, Sampler()])
def test_what_is_known_of_logits_is_used_where_they_stay_what_they_are(sampler, changes):
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    best, normaliser = logits.argmax(1), logits.logsumexp(1, keepdim=True)
    stays = not {"banned", "rules"} & changes.keys()
    choose, texts = Chooser(sampler=sampler, **changes), [[], [], []]

    def chosen(given):
        found = choose(given, range(3), texts, torch.Generator().manual_seed(3))
        tokens = found.tokens()
        return found.ids.tolist(), [one.id for one in tokens], torch.tensor([one.log_prob for one in tokens])

    for found, expected in zip(chosen(Scored(logits, best, normaliser)), chosen(logits), strict=True):
        torch.testing.assert_close(found, expected)
    false = chosen(Scored(logits, best * 0, normaliser + 1))
    told, expected = false[2], chosen(logits)
    assert false[0] == ([0, 0, 0] if stays and sampler is GREEDY else expected[0])
    if sampler is not GREEDY or not stays:
        torch.testing.assert_close(told, expected[2] - (1.0 if stays else 0.0))
