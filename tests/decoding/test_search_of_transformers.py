"""Beam search finds what the beam search of transformers finds, where they mean the same."""

import pytest
import torch
from torch import Tensor

from triglot.decoding.beam import BeamSearch, beam_search
from triglot.decoding.rules import BannedWords, MinLength, NoRepeatNGram

PAD, BOS, EOS = 0, 1, 2
BANNED = (PAD, BOS)


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


def compare(marian, beam: int, alpha: float, theirs: dict, ours: dict) -> list[list[int]]:
    """Checks that the two best texts of each sentence are the same, and returns them all."""
    src = torch.randint(3, 23, (7, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(src)
    mask[1, 5:] = mask[4, 3:] = 0
    src = src * mask
    limit = 13
    out = marian.generate(
        input_ids=src,
        attention_mask=mask,
        num_beams=beam,
        num_return_sequences=2,
        length_penalty=alpha,
        do_sample=False,
        max_new_tokens=limit,
        logits_processor=[more_end],
        renormalize_logits=True,
        forced_eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        **{"bad_words_ids": [[BOS], [PAD]], **theirs},
    )
    steps = Marian(marian, src, mask)
    first = steps.step(torch.full((len(src),), BOS))
    options = {"beam": beam, "length_penalty": alpha, "nbest": 2, "banned": BANNED, **ours}
    found = beam_search(first, steps, BeamSearch(eos_ids=[EOS], **options), limit)
    assert (out.sequences == EOS).any(1).all()  # texts cut at the limit they rank among the finished, we after them
    for row, texts in enumerate(found):
        for rank, text in enumerate(texts):
            ids = out.sequences[2 * row + rank, 1:].tolist()
            assert text.ids == ids[: ids.index(EOS) + 1]
            assert text.score(alpha) == pytest.approx(out.sequences_scores[2 * row + rank].item(), abs=1e-4)
    return [text.ids for texts in found for text in texts]


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [2, 5])
def test_the_exact_bound_is_early_stopping_never(marian, alpha, beam):
    texts = compare(marian, beam, alpha, {"early_stopping": "never"}, {})
    assert len({len(ids) for ids in texts}) > 2


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("beam", [2, 5])
def test_a_patience_of_one_is_early_stopping(marian, alpha, beam):
    texts = compare(marian, beam, alpha, {"early_stopping": True}, {"patience": 1.0})
    assert len({len(ids) for ids in texts}) > 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs", "rules"),
    [
        ({"min_new_tokens": 5}, [MinLength([EOS], 5)]),
        ({"no_repeat_ngram_size": 1}, [NoRepeatNGram(1)]),
        ({"no_repeat_ngram_size": 2}, [NoRepeatNGram(2)]),
        (
            {"bad_words_ids": [[BOS], [PAD], *([word] for word in range(3, 13)), [13, 14], [15]]},
            [BannedWords([*([word] for word in range(3, 13)), [13, 14], [15]])],
        ),
        ({"min_new_tokens": 5, "no_repeat_ngram_size": 2}, [MinLength([EOS], 5), NoRepeatNGram(2)]),
    ],
)
def test_bans_are_theirs(marian, theirs, rules):
    without = compare(marian, 5, 0.6, {"early_stopping": "never"}, {})
    assert compare(marian, 5, 0.6, {"early_stopping": "never", **theirs}, {"rules": rules}) != without
