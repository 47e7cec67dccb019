"""Which experts compute what: their loads by domain (languages, kinds of text), layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from triglot.checkpoint import Loaded, load_model
from triglot.config import RunConfig
from triglot.data.batch import IGNORED, Batch
from triglot.data.corpus import Example, read_blocks, read_lines
from triglot.data.dataset import Windows
from triglot.data.prepare import prepare
from triglot.errors import ConfigError, DataError, require
from triglot.evaluation import examples_dataset
from triglot.layers.moe import MixtureOfExperts
from triglot.models.encoder_decoder import Transformer
from triglot.objective import Model, evaluating, run_model

Loads = Float[Tensor, "layers experts"]


class Domains(NamedTuple):
    """Loads of a model's experts by domain."""

    layers: list[str]
    """The layers that have experts, as `encoder 1` or `layer 1`."""
    loads: dict[str, Loads]
    """By domain, the share of a layer's choices that fell on each expert."""

    def bits(self) -> list[float]:
        """Layer by layer, what one choice tells of the domain it was made in, if all were as frequent."""
        loads = torch.stack(list(self.loads.values()))  # [domains, layers, experts]
        entropy = torch.special.entr(loads).sum(-1)
        told = torch.special.entr(loads.mean(0)).sum(-1) - entropy.mean(0)
        return (told / np.log(2)).clamp(min=0).tolist()

    def largest(self) -> list[float]:
        """Layer by layer, the fullest expert's load over all domains, in even shares."""
        mean = torch.stack(list(self.loads.values())).mean(0)
        return (mean.amax(-1) * mean.size(-1)).tolist()


def expert_domains(run: Path, files: Mapping[str, Path], which: str = "best") -> Domains:
    """A run's experts by domain: of each file, or, without any, of the target tags of a translator's validation pairs.

    A translator's file has lines of source, tab and target; its domain's name is the target tag, where the run knows
    one of that name. Raises ConfigError for a run without experts, DataError for a file that has no text.
    """
    loaded = load_model(run, which)
    has = loaded.config.model.options.experts is not None
    require(has, "run", "one with experts", str(run), ConfigError)
    rule = "given, for a run without target tags"
    require(bool(files) or bool(loaded.tokenizers.source.tags), "files", rule, None, ConfigError)
    if files:
        batches = {name: _batches(loaded, name, path) for name, path in files.items()}
    else:
        examples = prepare(loaded.config, run, loaded.tokenizers).valid_examples or []
        tags = sorted({one.tag for one in examples if one.tag is not None})
        batches = {tag: _pairs(loaded, [one for one in examples if one.tag == tag]) for tag in tags}
    return Domains(layer_names(loaded.model), {name: loads(loaded.model, some) for name, some in batches.items()})


def layer_names(model: Model) -> list[str]:
    """The layers that have experts, in the order of their routings."""
    sides = {"encoder": model.encoder, "decoder": model.decoder} if isinstance(model, Transformer) else {"layer": model}
    return [
        f"{side} {number}"
        for side, stack in sides.items()
        for number, layer in enumerate(stack.layers, 1)
        if isinstance(layer.feed_forward, MixtureOfExperts)
    ]


def loads(model: Model, batches: Iterable[Batch]) -> Loads:
    """The share of each layer's choices that fell on each expert, over all batches."""
    total: Tensor | None = None
    with evaluating(model, torch.device("cpu")):
        for batch in batches:
            counts = [
                torch.bincount(one.experts[one.kept], minlength=len(one.load))
                for one in run_model(model, batch).routing
            ]
            total = torch.stack(counts) + (0 if total is None else total)
    if total is None:
        raise DataError("A domain must have text to be routed, but one has none.")
    return total / total.sum(-1, keepdim=True)


def _batches(loaded: Loaded, name: str, path: Path) -> Iterable[Batch]:
    config: RunConfig = loaded.config
    if isinstance(loaded.model, Transformer):
        tag = name if name in loaded.tokenizers.source.tags else None
        cells = [line.split("\t") for line in read_lines(path)]
        rule = "lines of source, tab and target"
        require(bool(cells) and all(len(one) > 1 for one in cells), str(path), rule, "others", DataError)
        return _pairs(loaded, [Example(one[0], one[1], tag) for one in cells])
    ids = [token for block in read_blocks(path) for token in loaded.tokenizers.target.encode(block)]
    require(len(ids) > 1, str(path), "a text of two tokens or more", len(ids), DataError)
    # None of these ids begins a document, so that nothing but what fills up is not scored.
    unmarked = replace(loaded.tokenizers.target.ids, bos=None)
    windows = Windows(np.array(ids, np.uint32), config.train.context, config.train.batch_tokens, unmarked).epoch(0)
    return (one._replace(segments=(one.targets != IGNORED).long()) for one in windows)  # the last is filled up


def _pairs(loaded: Loaded, examples: Sequence[Example]) -> Iterable[Batch]:
    return examples_dataset(examples, loaded.tokenizers, loaded.config).epoch(0)


def table(found: Domains) -> str:
    """A block of lines for each layer: a domain a line, an expert a column, loads in percent."""
    width = max(map(len, [*found.loads, "expert"]))
    lines = []
    for number, (layer, bits, largest) in enumerate(zip(found.layers, found.bits(), found.largest(), strict=True)):
        lines.append(f"{layer}: {bits:.3f} bits of the domain in a choice, fullest expert {largest:.2f} even shares")
        num_experts = next(iter(found.loads.values())).size(1)
        lines.append(f"  {'expert':{width}}" + "".join(f"{expert:7}" for expert in range(num_experts)))
        for name, of_domain in found.loads.items():
            shares = "".join(f"{100 * share:6.1f}%" for share in of_domain[number].tolist())
            lines.append(f"  {name:{width}}{shares}")
    return "\n".join(lines)


def as_dict(found: Domains) -> dict[str, Any]:
    """For JSON."""
    return {
        "layers": found.layers,
        "bits": found.bits(),
        "largest": found.largest(),
        "loads": {name: of_domain.tolist() for name, of_domain in found.loads.items()},
    }
