"""One page that shows what a model did with a text: masks, attention, alignment, probabilities, experts.

The page is a single file that needs no network: the numbers are those of the model's own `run`, embedded as JSON.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from triglot.checkpoint import find_checkpoint, load_model
from triglot.errors import ConfigError, DataError, require
from triglot.generation.alignment import best_layer, shifted, text_places
from triglot.generation.engine import Engine
from triglot.generation.scoring import prompt_ids
from triglot.insight.page import Page, require_free, write
from triglot.layers.masks import NO_PADDING, create_look_ahead_mask, create_masks
from triglot.layers.moe import MixtureOfExperts
from triglot.layers.routing import Routing
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.tokenizer import Tokenizer, Tokenizers

SCALE = 1000
"""Weights are stored as whole thousandths."""
TOP = 5
MOST_WEIGHTS = 8_000_000
"""Of one kind of attention: beyond, the page would be too big for a browser."""


def explain(
    run: Path, text: str, *, target: str | None = None, out: Path, tag: str | None = None, which: str = "best"
) -> Path:
    """Write the page about `text` to `out`: as a language model reads it, or with its translation, found or given.

    Raises DataError for a text that is empty or too long, ConfigError for a target or tag where there can be none, and
    where something else than a page of ours is in its place.
    """
    require_free(out, "out")
    model, config, tokenizers = load_model(run, which)
    if isinstance(model, DecoderLLM):
        require(target is None, "target", "left out for a language model", target, ConfigError)
        require(tag is None, "tag", "left out for a language model", tag, ConfigError)
        ids = prompt_ids(config, tokenizers.target, [text])[0]
        page = about_text(model, tokenizers.target, text, ids)
    else:
        if target is None:
            found = Engine(model, config, tokenizers).translate([text], tags=tag)[0][0]
            produced = [token for token in found.tokens if token not in tokenizers.target.ids.ends]
            produced = produced[: model.max_seq_length - 1]  # of a text that came to no end
        else:
            [produced] = tokenizers.encode_targets([target])
        page = about_pair(model, tokenizers, text, produced, tag)
        how = f"found by beam search, {config.generation.beam} wide" if target is None else "given"
        page["facts"].insert(1, ["Target", f"{tokenizers.target.decode(produced)} ({how})"])
    page["title"] = f"{run.resolve().name}: {text if len(text) <= 60 else text[:59] + '…'}"
    shape = f"{config.model.num_layers} layers, {config.model.num_heads} heads, width {config.model.d_model}"
    name = find_checkpoint(run, which).name
    page["facts"] += [["Model", f"{type(model).__name__}, {shape}"], ["Run", f"{run.resolve().name}, {name}"]]
    return write("explain", page, out)


# What the pages are made of


@torch.no_grad()
def about_text(model: DecoderLLM, tokenizer: Tokenizer, text: str, ids: list[int]) -> Page:
    """What a language model does with a text, of which it reads `ids`, as `generate` reads a prompt."""
    require(bool(text), "text", "no empty one", text, DataError)
    _check_length("text", len(ids), model.max_len)
    _check_size(model.layers, len(ids))
    run = model.run(torch.tensor([ids]), need_weights=True)
    probabilities = model.head(run.hidden)[0].float().softmax(-1)[:, : tokenizer.vocab_size]
    pieces = tokenizer.pieces(ids)
    look_ahead = "a token may attend to itself and to those before it, never to a later one."
    mask = create_look_ahead_mask(len(ids), window=model.options.window)
    blocks = [f"Layer {number + 1}" for number, layer in enumerate(model.layers) if _has_experts(layer)]
    experts = describe_experts("Experts", pieces, blocks, run.routing)
    first: Page = {"piece": pieces[0], "p": None, "loss": None, "top": []}
    return {
        "lead": "How a decoder-only language model reads a text and what it expects next.",
        "facts": [["Text", text], *_total(probabilities[:-1], ids[1:])],
        "maps": [
            _mask("Look-ahead mask", look_ahead, pieces, pieces, mask),
            _attention(
                "Self-attention", "Each row is a token and shows what it reads.", pieces, pieces, run.self_weights, 0
            ),
        ],
        "tokens": [first, *describe_tokens(tokenizer, probabilities[:-1], ids[1:])],
        "next": describe_top(tokenizer, probabilities[-1]),
        "words": None,
        "experts": [experts] if blocks else [],
    }


@torch.no_grad()
def about_pair(
    model: Transformer, tokenizers: Tokenizers, text: str, produced: Sequence[int], tag: str | None = None
) -> Page:
    """What an encoder–decoder does with a source and a target, forced token by token."""
    require(bool(text.strip()), "text", "no empty one", text, DataError)
    source = tokenizers.encode_sources([text], [tag])[0]
    ids, size = tokenizers.target.ids, tokenizers.target.vocab_size
    read, wanted = [ids.start, *produced], [*produced, ids.eos]
    _check_length("text", len(source), model.max_seq_length)
    _check_length("target", len(read), model.max_seq_length)
    _check_size(model.decoder.layers, max(len(source), len(read)))
    src, tgt = torch.tensor([source]), torch.tensor([read])
    masks = create_masks(src, tgt, pad_id=NO_PADDING)
    run = model.run(src, tgt, *masks, need_weights=True)
    probabilities = model.head(run.hidden)[0].float().softmax(-1)[:, :size]
    x, y = tokenizers.source.pieces(source), tokenizers.target.pieces(read)
    padding = "the tokens of the source that are no padding; alone in its batch, a sentence has none."
    look_ahead = "a target token may attend to itself and to those before it, never to a later one."
    experts = []
    routing, at = run.routing, 0
    for side, pieces, stack in (("Encoder", x, model.encoder), ("Decoder", y, model.decoder)):
        names = [f"Layer {number + 1}" for number, layer in enumerate(stack.layers) if _has_experts(layer)]
        if names:
            experts.append(describe_experts(f"{side}’s experts", pieces, names, routing[at : at + len(names)]))
        at += len(names)
    alignment, words = align(run.dec_enc_attention or [], tokenizers, source, list(produced))
    return {
        "lead": "How an encoder–decoder reads a source and writes its target.",
        "facts": [["Source", text], *_total(probabilities, wanted)],
        "maps": [
            _mask("Source padding mask", padding, ["every token"], x, masks.src_mask[0, 0]),
            _mask("Look-ahead mask of the target", look_ahead, y, y, masks.tgt_mask[0, 0]),
            _attention("Encoder self-attention", "Source reads source.", x, x, run.enc_attention),
            _attention("Decoder self-attention", "Target reads what was written.", y, y, run.dec_self_attention, 1),
            _attention("Cross-attention", "Target reads source.", y, x, run.dec_enc_attention),
            *alignment,
        ],
        "tokens": describe_tokens(tokenizers.target, probabilities, wanted),
        "next": None,
        "words": words,
        "experts": experts,
    }


def _has_experts(layer: torch.nn.Module) -> bool:
    return isinstance(layer.feed_forward, MixtureOfExperts)


def _check_length(name: str, length: int, limit: int) -> None:
    require(length <= limit, name, f"at most {limit} tokens long", f"{length} tokens", DataError)


def _check_size(layers: torch.nn.ModuleList, longest: int) -> None:
    weights = sum(layer.self_attention.num_heads for layer in layers) * longest**2  # type: ignore[misc,union-attr]  # a ModuleList tells of no kind
    rule = f"short enough for {MOST_WEIGHTS:,} attention weights on a page"
    require(weights <= MOST_WEIGHTS, "text", rule, f"one with {weights:,}", DataError)


# Attention


def thousandths(weights: Float[Tensor, "..."]) -> list[int]:
    """Weights as whole thousandths, row by row."""
    whole: list[int] = (weights * SCALE).round().int().flatten().tolist()
    return whole


def _attention(
    name: str,
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    attention: Sequence[Tensor] | None,
    mask: int | None = None,
) -> Page:
    assert attention is not None
    return {
        "name": name,
        "caption": f"{caption} The weights of a row sum to 1.",
        "kind": "attention",
        "rows": rows,
        "columns": columns,
        "layers": [[thousandths(head) for head in layer[0]] for layer in attention],
        "mask": mask,
        "layer": 0,
    }


def _mask(name: str, caption: str, rows: Sequence[str], columns: Sequence[str], mask: Tensor) -> Page:
    return {
        "name": name,
        "caption": f"Filled: may attend; empty: hidden. A row is who reads, a column what is read: {caption}",
        "kind": "mask",
        "rows": rows,
        "columns": columns,
        "layers": [[mask.int().flatten().tolist()]],
        "mask": None,
        "layer": 0,
    }


def align(
    cross_attention: Sequence[Float[Tensor, "1 heads target source"]],
    tokenizers: Tokenizers,
    source: Sequence[int],
    produced: Sequence[int],
) -> tuple[list[Page], Page | None]:
    """Which of the source each target token and word renders, in every layer (Shift-Att, Chen et al. 2020).

    What falls on the begin and end tokens, the tag and padding is told apart, and the rest is scaled to sum to 1.
    """
    text = text_places(tokenizers.source, source)
    if not text or not produced:
        return [], None
    read = [source[place] for place in text]
    source_words, target_words = words_of(tokenizers.source, read), words_of(tokenizers.target, produced)
    default = best_layer(len(cross_attention))
    by_token, by_word, apart = [], [], []
    for layer in cross_attention:
        aligned, special = shifted(layer[0], text)
        by_token.append([thousandths(aligned)])
        merged = merge(aligned, source_words, target_words)
        by_word.append([thousandths(merged)])
        apart.append(merge(special[:, None], [[0]], target_words)[:, 0])
    rows, columns = _texts(tokenizers.target, produced, target_words), _texts(tokenizers.source, read, source_words)
    how = "The heads’ mean at the step that reads the row’s token; special tokens are left out and rows sum to 1."
    common = {"kind": "attention", "mask": None, "layer": default}
    maps = [
        {"name": "Alignment of words", "caption": how, "rows": rows, "columns": columns, "layers": by_word, **common},
        {
            "name": "Alignment of tokens",
            "caption": how,
            "rows": tokenizers.target.pieces(produced),
            "columns": tokenizers.source.pieces(read),
            "layers": by_token,
            **common,
        },
    ]
    width, best = len(columns), by_word[default][0]
    lines = []
    for number, word in enumerate(rows):
        row = best[number * width : (number + 1) * width]
        column = max(range(width), key=row.__getitem__)
        share = round(apart[default][number].item(), 3)
        lines.append({"target": word, "source": columns[column], "weight": row[column] / SCALE, "apart": share})
    return maps, {"layer": default + 1, "lines": lines}


def merge(
    weights: Float[Tensor, "rows columns"], columns: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> Float[Tensor, "row_groups column_groups"]:
    """Sums over the columns of a word, means over its rows, so that rows still sum to 1."""
    summed = torch.stack([weights[:, list(group)].sum(1) for group in columns], 1)
    return torch.stack([summed[list(group)].mean(0) for group in rows])


def words_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[list[int]]:
    """The places of `ids` grouped into words, each with the white space in front of it."""
    groups: list[list[int]] = []
    has_text, ended = True, True
    for place, token in enumerate(ids):
        piece = tokenizer.token_bytes(token)
        if not groups or (has_text and (ended or piece[:1].isspace())):
            groups.append([])
            has_text = False
        groups[-1].append(place)
        has_text = has_text or bool(piece.strip())
        ended = piece[-1:].isspace()
    return groups


def _texts(tokenizer: Tokenizer, ids: Sequence[int], groups: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode([ids[place] for place in group]).strip() or "▁" for group in groups]


# Probabilities and experts


def describe_tokens(
    tokenizer: Tokenizer, probabilities: Float[Tensor, "length vocab"], ids: Sequence[int]
) -> list[Page]:
    """For each token its probability, its loss in nats, and the most probable ones in its place."""
    return [
        {
            "piece": piece,
            "p": _round(row[token].item()),
            "loss": round(-row[token].clamp(min=torch.finfo(row.dtype).tiny).log().item(), 3),
            "top": describe_top(tokenizer, row),
        }
        for piece, token, row in zip(tokenizer.pieces(ids), ids, probabilities, strict=True)
    ]


def describe_top(tokenizer: Tokenizer, probabilities: Float[Tensor, " vocab"]) -> list[list[Any]]:
    """The most probable tokens, each with its probability."""
    best = probabilities.topk(min(TOP, len(probabilities)))
    return [
        [piece, _round(p)]
        for piece, p in zip(tokenizer.pieces(best.indices.tolist()), best.values.tolist(), strict=True)
    ]


def _round(p: float) -> float:
    return float(f"{p:.3g}") if p < 0.001 else round(p, 4)


def _total(probabilities: Float[Tensor, "length vocab"], ids: Sequence[int]) -> list[list[str]]:
    if not ids:
        return []
    chosen = probabilities.gather(1, torch.tensor(ids)[:, None])
    loss = -chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log().mean().item()
    return [["Mean loss", f"{loss:.3f} nats per token (perplexity {torch.tensor(loss).exp().item():.2f})"]]


def describe_experts(name: str, pieces: Sequence[str], layers: Sequence[str], routing: Sequence[Routing]) -> Page:
    """Each token's experts and weights in every layer that has some, and each expert's load."""
    return {
        "name": name,
        "layers": layers,
        "tokens": [
            {"piece": piece, "choices": [_choices(one, place) for one in routing]} for place, piece in enumerate(pieces)
        ],
        "load": [[round(share, 3) for share in one.load.tolist()] for one in routing],
        "even": round(1 / len(routing[0].load), 3) if routing else 0,
    }


def _choices(routing: Routing, place: int) -> list[list[Any]]:
    kept = routing.kept[0, place]
    experts, weights = (part[0, place][kept].tolist() for part in (routing.experts, routing.weights))
    return [[expert, round(weight, 3)] for expert, weight in zip(experts, weights, strict=True)]
