"""Every choice of a run, as frozen dataclasses that refuse what they do not know."""

import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from triglot.errors import ConfigError, require

Norm = Literal["layer", "rms"]
NormOrder = Literal["pre", "post"]
Positions = Literal["sinusoidal", "learned", "rotary"]
Activation = Literal["relu", "gelu", "swiglu"]
Kind = Literal["encoder_decoder", "decoder_only"]


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    require(holds, name, rule, value, ConfigError)


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """A mixture of experts in the place of the feed-forward of every `every`-th block."""

    num_experts: int
    """How many experts a layer has."""
    top_k: int = 2
    """How many of them a token visits."""
    d_ff: int | None = None
    """Inner width of one expert; None: the block's own `d_ff`."""
    every: int = 1
    """1: every block; n: the n-th, 2n-th, … block."""
    capacity_factor: float | None = None
    """None drops nothing; a factor limits an expert's share of a training batch (Fedus et al. 2021, §2.2)."""
    balance_weight: float = 0.01
    """Weight of the load-balancing loss, which is 1 at perfect balance."""
    z_weight: float = 0.001
    """Weight of the router z-loss (Zoph et al. 2022, eq. 5)."""
    router_bias: bool = False
    """A bias in the router; the founding document has one, no released model does."""

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, "experts.num_experts", "at least 1", self.num_experts)
        rule = f"between 1 and num_experts ({self.num_experts})"
        _require(1 <= self.top_k <= self.num_experts, "experts.top_k", rule, self.top_k)
        _require(self.every >= 1, "experts.every", "at least 1", self.every)
        _require(self.d_ff is None or self.d_ff >= 1, "experts.d_ff", "at least 1", self.d_ff)
        factor = self.capacity_factor
        _require(factor is None or factor > 0, "experts.capacity_factor", "above 0, or left out", factor)
        for name in ("balance_weight", "z_weight"):
            _require(getattr(self, name) >= 0, f"experts.{name}", "at least 0", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What may differ from the founding document's blocks; the defaults are the document's."""

    norm: Norm = "layer"
    norm_order: NormOrder = "post"
    norm_eps: float = 1e-5
    final_norm: bool | None = None
    """A norm after the last block; None: with pre-norm, and always in the `DecoderLLM`."""
    positions: Positions = "sinusoidal"
    rope_theta: float = 10_000.0
    activation: Activation = "relu"
    bias: bool = True
    """Biases in the projections of attention and feed-forward."""
    output_bias: bool | None = None
    """A bias of the projection to the vocabulary; None: the document's choice (`Transformer` yes, `DecoderLLM` no)."""
    num_kv_heads: int | None = None
    """Fewer heads for keys and values than for queries (Ainslie et al. 2023); None: as many."""
    tie_embeddings: bool = False
    """One matrix for every embedding and the output projection (Press & Wolf 2017)."""
    scale_embeddings: bool = True
    """Multiply embeddings by √d_model (Vaswani et al. 2017, §3.4)."""
    attention_dropout: float | None = None
    """Dropout on attention weights; None: the model's `dropout`, and 0 in the `DecoderLLM`, as in the document."""
    activation_dropout: float | None = None
    """Dropout inside the feed-forward; None: the model's `dropout`."""
    embedding_dropout: float | None = None
    """Dropout on embeddings; None: the model's `dropout`, and 0 in the `DecoderLLM`, as in the document."""
    experts: ExpertOptions | None = None

    def __post_init__(self) -> None:
        _require(self.norm_eps > 0, "norm_eps", "above 0", self.norm_eps)
        _require(self.rope_theta > 0, "rope_theta", "above 0", self.rope_theta)
        heads = self.num_kv_heads
        _require(heads is None or heads >= 1, "num_kv_heads", "at least 1", heads)
        for name in ("attention_dropout", "activation_dropout", "embedding_dropout"):
            rate = getattr(self, name)
            _require(rate is None or 0 <= rate < 1, name, "at least 0 and below 1", rate)

    def with_dropout(self, *, attention: float, embedding: float) -> "BlockOptions":
        """These options with the rates that are None filled in."""
        return dataclasses.replace(
            self,
            attention_dropout=attention if self.attention_dropout is None else self.attention_dropout,
            embedding_dropout=embedding if self.embedding_dropout is None else self.embedding_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model; vocabulary sizes are filled in from the tokenizers."""

    kind: Kind
    d_model: int = 512
    num_heads: int = 8
    num_layers: int = 6
    d_ff: int = 2048
    max_seq_length: int = 5000
    dropout: float = 0.1
    vocab_size: int = 0
    """Of the language model, or of the target side."""
    src_vocab_size: int = 0
    """Of the source side of an encoder–decoder."""
    options: BlockOptions = BlockOptions()

    def __post_init__(self) -> None:
        for name in ("d_model", "num_heads", "num_layers", "d_ff", "max_seq_length"):
            _require(getattr(self, name) >= 1, f"model.{name}", "at least 1", getattr(self, name))
        _require(0 <= self.dropout < 1, "model.dropout", "at least 0 and below 1", self.dropout)
        rule = f"divisible by model.num_heads ({self.num_heads})"
        _require(self.d_model % self.num_heads == 0, "model.d_model", rule, self.d_model)
        kv_heads = self.options.num_kv_heads or self.num_heads
        rule = f"a divisor of model.num_heads ({self.num_heads})"
        _require(self.num_heads % kv_heads == 0, "model.options.num_kv_heads", rule, kv_heads)
        if self.options.positions == "rotary":
            rule = "even with rotary positions"
            _require(
                self.d_model // self.num_heads % 2 == 0, "the width of a head", rule, self.d_model // self.num_heads
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes token ids; trained on the training text unless `path` names one that exists."""

    kind: Literal["byte", "char", "bpe"] = "bpe"
    vocab_size: int = 8000
    """Of BPE, special tokens and the 256 bytes included; the other kinds have the size they have."""
    joint: bool = True
    """One tokenizer for both sides of pairs, or one each."""
    path: str | None = None
    """A trained tokenizer's file or folder."""

    def __post_init__(self) -> None:
        if self.kind == "bpe":
            _require(self.vocab_size >= 300, "tokenizer.vocab_size", "at least 300", self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on; which fields count depends on `kind`.

    `text` reads files, folders or globs; `pairs` two files of equal length or one of tab-separated columns;
    `phrases` makes numbers and dates with their translations; `stdlib` is Python's own standard library.
    """

    kind: Literal["text", "pairs", "phrases", "stdlib"]
    root: str = "."
    """The data set's own folder; other paths are relative to it."""
    files: tuple[str, ...] = ()
    """text: files, folders or globs; pairs: files of source, target and optionally a target tag, tab-separated."""
    source: str | None = None
    target: str | None = None
    valid: str | float = 0.05
    """A file or glob to validate on (text, tab-separated pairs), or the fraction held out; phrases have their own."""
    valid_source: str | None = None
    valid_target: str | None = None
    test_source: str | None = None
    test_target: str | None = None
    hold_out: Literal["seeded", "tail"] = "seeded"
    """What a fraction takes: documents or lines drawn by the seed, or the last characters (text) or lines (pairs)."""
    document: Literal["file", "line", "paragraph"] = "file"
    """text: what a document is; it stands between the tokens for beginning and end of sequence."""
    packing: Literal["crops", "documents"] = "crops"
    """text: windows cut anywhere, or whole documents side by side that do not attend across their borders."""
    language: str = "de"
    """phrases: the language to translate to, of `de`, `fr` and `cs`."""
    num_examples: int = 50_000
    """phrases: how many make an epoch."""
    max_bytes: int | None = None
    """stdlib, text: stop after so many bytes."""

    def __post_init__(self) -> None:
        fraction = isinstance(self.valid, float | int) and not isinstance(self.valid, bool)
        if fraction:
            _require(0 < float(self.valid) < 1, "data.valid", "a file or a fraction between 0 and 1", self.valid)
        pairs_by_two = self.source is not None and self.target is not None
        if self.kind == "text":
            _require(bool(self.files), "data.files", "one file or more", self.files)
        if self.kind == "pairs":
            rule = "given together with data.target, or data.files given instead"
            _require(pairs_by_two != bool(self.files), "data.source", rule, self.source)
            both = (self.valid_source is None) == (self.valid_target is None)
            _require(both, "data.valid_source", "given together with data.valid_target", self.valid_source)
            both = (self.test_source is None) == (self.test_target is None)
            _require(both, "data.test_source", "given together with data.test_target", self.test_source)
        _require(self.language in ("de", "fr", "cs"), "data.language", "one of de, fr, cs", self.language)
        _require(self.num_examples >= 1, "data.num_examples", "at least 1", self.num_examples)
        rule = "at least 1, or left out"
        _require(self.max_bytes is None or self.max_bytes >= 1, "data.max_bytes", rule, self.max_bytes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; counts of steps are optimizer steps."""

    max_steps: int = 1000
    max_epochs: int | None = None
    """Stop after so many passes through the data, if that comes first."""
    max_minutes: float | None = None
    """Stop after so many minutes of training, if that comes first; `decay` does not know of it."""
    batch_tokens: int = 4096
    """Tokens of one micro-batch: rows × longest side, padding included."""
    accumulate: int = 1
    """Micro-batches of one step; the loss is the mean over all their real tokens."""
    context: int = 256
    """Language models: tokens of one window."""
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "inverse_sqrt", "linear", "constant"] = "cosine"
    """After the warm-up: to `min_learning_rate` by cosine or line, by 1/√step (Vaswani et al. 2017, §5.3), or flat."""
    warmup_steps: int = 100
    min_learning_rate: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: both are timed on the first batch and the faster one is written into the run."""
    threads: int | None = None
    eval_every: int = 200
    """Steps between evaluations and checkpoints."""
    log_every: int = 10
    keep_best: Literal["loss", "bleu", "exact_match"] = "loss"
    """The metric that chooses the best checkpoint."""
    average: int = 0
    """Score at the end the mean of the last so many checkpoints' weights too, `eval_every` steps apart; 0: none."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "accumulate", "context", "eval_every", "log_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        for name in ("max_epochs", "max_minutes", "threads"):
            limit = getattr(self, name)
            _require(limit is None or limit > 0, f"train.{name}", "above 0, or left out", limit)
        _require(self.learning_rate > 0, "train.learning_rate", "above 0", self.learning_rate)
        _require(self.warmup_steps >= 0, "train.warmup_steps", "at least 0", self.warmup_steps)
        rule = f"between 0 and train.learning_rate ({self.learning_rate})"
        floor = self.min_learning_rate
        _require(0 <= floor <= self.learning_rate, "train.min_learning_rate", rule, floor)
        _require(0 <= self.label_smoothing < 1, "train.label_smoothing", "at least 0 and below 1", self.label_smoothing)
        _require(self.clip_norm is None or self.clip_norm > 0, "train.clip_norm", "above 0", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the weights come from, when not from chance."""

    from_: str | None = None
    """A run whose weights and tokenizer to start from, with a fresh optimizer."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How `evaluate` and the samples during training decode."""

    beam: int = 4
    length_penalty: float = 1.0
    """α in score / n^α, n the number of generated tokens, the end token included."""
    max_new_tokens: int = 200


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A recipe: all that a run is made of."""

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    init: InitConfig = InitConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        fits = (self.model.kind == "encoder_decoder") == (self.data.kind in ("pairs", "phrases"))
        _require(fits, "data.kind", f"one that {self.model.kind} can learn from", self.data.kind)
        if self.model.kind == "decoder_only":
            rule = f"at most model.max_seq_length ({self.model.max_seq_length})"
            _require(self.train.context <= self.model.max_seq_length, "train.context", rule, self.train.context)
            rule = f"at least train.context ({self.train.context})"
            _require(self.train.batch_tokens >= self.train.context, "train.batch_tokens", rule, self.train.batch_tokens)
        if self.model.kind == "encoder_decoder" and self.model.options.tie_embeddings:
            _require(self.tokenizer.joint, "tokenizer.joint", "true with tied embeddings", self.tokenizer.joint)


T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a config from nested plain values; unknown keys, missing keys and wrong types are named by dotted path."""
    hints = get_type_hints(cls)
    fields = {field.name.rstrip("_"): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        _require(key in fields, f"{path}{key}", f"one of {', '.join(fields)}", key)
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and key not in values:
            raise ConfigError(f"`{path}{key}` must be given.")
    return cls(
        **{fields[key].name: _convert(hints[fields[key].name], value, f"{path}{key}") for key, value in values.items()}
    )


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, Mapping), path, "a table", value)
        return from_dict(kind, value, f"{path}.")  # type: ignore[arg-type]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        _require(value in args, path, f"one of {', '.join(map(str, args))}", value)
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is tuple:
        _require(isinstance(value, list | tuple), path, "a list", value)
        of = [args[0]] * len(value) if args[-1] is ... else list(args)
        _require(len(of) == len(value), path, f"a list of {len(of)}", value)
        return tuple(_convert(one, item, f"{path}[{i}]") for i, (one, item) in enumerate(zip(of, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(
        type(value) is kind,
        path,
        {"str": "a string", "int": "a whole number"}.get(kind.__name__, f"a {kind.__name__}"),
        value,
    )
    return value


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [one for one in args if one is not type(None)]
    for one in options[:-1]:
        try:
            return _convert(one, value, path)
        except ConfigError:
            continue
    return _convert(options[-1], value, path)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values, every field spelled out; `from_dict` reads it back."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name.rstrip("_")] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return plain


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def load_config(path: Path) -> RunConfig:
    """Read what `save_config` wrote."""
    return from_dict(RunConfig, json.loads(path.read_text(encoding="utf-8")))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, or lie in the repository that it runs from, by name."""
    package = Path(__file__).parent
    folders = (package.parents[1] / "recipes", package / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a recipe in TOML and apply overrides of the form `train.max_steps=100`, values read as TOML or as text."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"`recipe` must be a file that can be read, but is {str(path)!r} instead.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        _override(values, override)
    return from_dict(RunConfig, values)


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    _require(bool(equals) and bool(dotted), "--set", "of the form a.b=value", override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text == "none" else text
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        _require(isinstance(values, dict), "--set", "a path through tables", override)
    values[key] = value
