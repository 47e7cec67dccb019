"""Every choice of a run, as frozen dataclasses that refuse what they do not know."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from triglot.errors import ConfigError, require
from triglot.typed import require_type

Norm = Literal["layer", "rms"]
NormOrder = Literal["pre", "post"]
Positions = Literal["sinusoidal", "learned", "rotary", "relative"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu_tanh"]
Router = Literal["softmax", "softmax_of_chosen", "sigmoid", "expert_choice"]  # as in `layers.routing`
Kind = Literal["encoder_decoder", "decoder_only"]


class Rule(NamedTuple):
    """What the values of a field must be, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


Natural = Annotated[int, Rule("at least 0", lambda number: number >= 0)]
Seed = Annotated[int, Rule("at least 0 and below 2^63", lambda seed: 0 <= seed < 2**63)]
Count = Annotated[int, Rule("at least 1", lambda number: number >= 1)]
Rate = Annotated[float, Rule("at least 0 and below 1", lambda rate: 0 <= rate < 1)]
Weight = Annotated[float, Rule("at least 0 and finite", lambda weight: 0 <= weight < math.inf)]
Positive = Annotated[float, Rule("above 0 and finite", lambda number: 0 < number < math.inf)]
Share = Annotated[float, Rule("above 0 and at most 1", lambda share: 0 < share <= 1)]
Patience = Annotated[float, Rule("above 0, or inf", lambda number: number > 0)]


def rules(hint: Any) -> Iterator[Rule]:
    """The rules of a field, read off its type."""
    yield from (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Rule))
    for part in get_args(hint):
        yield from rules(part)


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    require(holds, name, rule, value, ConfigError)


class Checked:
    """A config whose values are checked by their types and the rules of these, in __post_init__ against each other."""

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            require_type(name.rstrip("_"), value, types[name])
            for rule in rules(hint) if value is not None else ():
                holds = all(map(rule.holds, value)) if isinstance(value, tuple) else rule.holds(value)
                _require(holds, name.rstrip("_"), rule.text, value)

    def _left_out_unless(self, *fields: tuple[str, bool, str]) -> None:
        """Refuse a value in a field that does not count, given when it does, as a test and in words."""
        for name, counts, where in fields:
            value, default = getattr(self, name), getattr(type(self), name)
            _require(counts or value == default, name, f"left out unless {where}", value)


@dataclass(frozen=True, kw_only=True)
class ExpertOptions(Checked):
    """A mixture of experts in the place of the feed-forward of every `every`-th block."""

    num_experts: Count
    """How many experts a layer has."""
    top_k: Count = 2
    """How many of them a token visits; with expert choice, how many visit a token on average."""
    d_ff: Count | None = None
    """Inner width of one expert; None: the block's own `d_ff`."""
    shared: Natural = 0
    """So many further experts that every token visits, as one of `shared` times the width (Dai et al. 2024, §3.2)."""
    every: Count = 1
    """1: every block; n: the n-th, 2n-th, … block."""
    side: Literal["both", "encoder", "decoder"] = "both"
    """encoder_decoder: whose blocks."""
    router: Router = "softmax"
    """softmax: the most probable, weighted by probability; softmax_of_chosen: by a softmax over these alone;
    sigmoid: chosen with a bias that keeps the load even without a loss (Wang et al. 2024); expert_choice: experts
    choose their tokens, in encoders only (Zhou et al. 2022)."""
    renormalize: bool | None = None
    """softmax: whether a token's weights sum to 1; None: with more than one expert, as in Mixtral; OLMoE: false."""
    bias_rate: Weight = 0.001
    """sigmoid: how far the bias moves after each step."""
    noise: Weight = 0.0
    """Standard deviation of what is added to the router's logits in training."""
    capacity_factor: Positive | None = None
    """None drops nothing; a factor limits an expert's share of a training batch (Fedus et al. 2021, §2.2)."""
    capacity_over: Literal["batch", "sequence"] = "batch"
    """Whether places are given in the whole batch, or in each sequence by itself."""
    min_capacity: Count = 4
    """No expert has fewer places."""
    balance_weight: Weight = 0.01
    """Weight of the load-balancing loss, which is 1 at perfect balance."""
    importance_weight: Weight = 0.0
    """Weight of the squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 7)."""
    z_weight: Weight = 0.001
    """Weight of the router z-loss (Zoph et al. 2022, eq. 5)."""
    router_bias: bool = False
    """A bias in the router; the founding document has one, no released model does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"at most num_experts ({self.num_experts}), and is 2 unless it is given"
        _require(self.top_k <= self.num_experts, "top_k", rule, self.top_k)
        single = self.top_k == 1 and (self.renormalize or self.router == "softmax_of_chosen")
        rule = "at least 2 where a token's weights sum to 1: a weight that is always 1 teaches a router nothing"
        _require(not single, "top_k", rule, self.top_k)
        limited = self.capacity_factor is not None
        self._left_out_unless(
            ("renormalize", self.router == "softmax", 'router is "softmax"'),
            ("bias_rate", self.router == "sigmoid", 'router is "sigmoid"'),
            ("capacity_over", limited, "there is a capacity_factor"),
            ("min_capacity", limited, "there is a capacity_factor"),
        )
        takes = self.router != "expert_choice" or not limited
        rule = "None with expert_choice, where experts take as many tokens as they have places for"
        _require(takes, "capacity_factor", rule, self.capacity_factor)

    def on(self, side: Literal["encoder", "decoder"]) -> bool:
        """Whether blocks of this side have experts."""
        return self.side in ("both", side)

    def check_for_decoders(self, path: str = "") -> None:
        """Raise ConfigError for what would look into the future."""
        rule = (
            'another, or side "encoder", where there is a decoder:'
            " whom experts choose there depends on tokens that are not yet written"
        )
        _require(self.router != "expert_choice", f"{path}router", rule, self.router)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked):
    """Rotary positions of a model that reads longer texts than it was first trained on (`layers/rope_scaling.py`)."""

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: Annotated[float, Rule("at least 1 and finite", lambda factor: 1 <= factor < math.inf)]
    """How many times as long texts may be."""
    original_max_position: Count | None = None
    """All but linear: tokens of a text in that first training."""
    low_freq_factor: Positive = 1.0
    """llama3: what turns less often than this in so many tokens is slowed down by `factor`,"""
    high_freq_factor: Positive = 4.0
    """and what turns more often than this, not at all."""
    beta_fast: Positive = 32.0
    """yarn: what turns so often is not slowed down,"""
    beta_slow: Positive = 1.0
    """and what turns so seldom is, by `factor`."""
    attention_factor: Positive | None = None
    """yarn: what queries and keys are multiplied by; None: 1 + 0.1 · ln factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        llama3, yarn = self.kind == "llama3", self.kind == "yarn"
        self._left_out_unless(
            ("original_max_position", self.kind != "linear", 'kind is "dynamic", "llama3" or "yarn"'),
            ("low_freq_factor", llama3, 'kind is "llama3"'),
            ("high_freq_factor", llama3, 'kind is "llama3"'),
            ("beta_fast", yarn, 'kind is "yarn"'),
            ("beta_slow", yarn, 'kind is "yarn"'),
            ("attention_factor", yarn, 'kind is "yarn"'),
        )
        given = self.kind == "linear" or self.original_max_position is not None
        _require(given, "original_max_position", 'given unless kind is "linear"', None)
        rule = f"above low_freq_factor ({self.low_freq_factor})"
        _require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", rule, self.high_freq_factor)
        rule = f"above beta_slow ({self.beta_slow})"
        _require(self.beta_fast > self.beta_slow, "beta_fast", rule, self.beta_fast)


@dataclass(frozen=True, kw_only=True)
class BlockOptions(Checked):
    """What may differ from the founding document's blocks; the defaults are the document's."""

    norm: Norm = "layer"
    norm_order: NormOrder = "post"
    norm_eps: Positive = 1e-5
    final_norm: bool | None = None
    """A norm after the last block; None: with pre-norm, and always in the `DecoderLLM`."""
    positions: Positions = "sinusoidal"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    relative_buckets: Annotated[int, Rule("at least 4", lambda buckets: buckets >= 4)] = 32
    """relative: a learned number for each of so many distances, the far ones in ranges (Raffel et al. 2020, §2.1)."""
    relative_distance: Count = 128
    """relative: from so far on all distances are one."""
    window: Count | None = None
    """decoder_only: a token attends to so many of the last, itself included (Jiang et al. 2023); None: to all."""
    activation: Activation = "relu"
    bias: bool = True
    """Biases in the projections of attention and feed-forward."""
    qkv_bias: bool | None = None
    """Biases in the projections to queries, keys and values; None: as `bias`."""
    output_bias: bool | None = None
    """A bias of the projection to the vocabulary; None: the document's choice (`Transformer` yes, `DecoderLLM` no)."""
    num_kv_heads: Count | None = None
    """Fewer heads for keys and values than for queries (Ainslie et al. 2023); None: as many."""
    head_dim: Count | None = None
    """Width of a head; None: d_model / num_heads."""
    qk_norm: Literal["head", "width"] | None = None
    """An RMSNorm of queries and keys, before they are rotated: of each head, or of all heads as one."""
    scale_attention: bool = True
    """Divide scores by √head_dim (Vaswani et al. 2017, §3.2.1)."""
    tie_embeddings: bool = False
    """One matrix for every embedding and the output projection (Press & Wolf 2017)."""
    scale_embeddings: bool = True
    """Multiply embeddings by √d_model (Vaswani et al. 2017, §3.4)."""
    embedding_norm: bool = False
    """A norm of embeddings with their positions (Lewis et al. 2020)."""
    scale_output: bool = False
    """Divide what is projected to the vocabulary by √d_model (Raffel et al. 2020)."""
    attention_dropout: Rate | None = None
    """Dropout on attention weights; None: the model's `dropout`, and 0 in the `DecoderLLM`, as in the document."""
    activation_dropout: Rate | None = None
    """Dropout inside the feed-forward; None: the model's `dropout`."""
    embedding_dropout: Rate | None = None
    """Dropout on embeddings; None: the model's `dropout`, and 0 in the `DecoderLLM`, as in the document."""
    experts: ExpertOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        relative, where = self.positions == "relative", 'positions are "relative"'
        self._left_out_unless(
            ("rope_scaling", self.positions == "rotary", 'positions are "rotary"'),
            ("relative_buckets", relative, where),
            ("relative_distance", relative, where),
        )
        rule = f"above half of relative_buckets ({self.relative_buckets})"
        _require(self.relative_distance > self.relative_buckets // 2, "relative_distance", rule, self.relative_distance)
        rule = "left out with relative positions, which are of each head"
        _require(not relative or self.num_kv_heads is None, "num_kv_heads", rule, self.num_kv_heads)

    def check_for_pairs(self, path: str = "") -> None:
        """Raise ConfigError for what an encoder–decoder does not have."""
        _require(self.window is None, f"{path}window", "None where there is an encoder", self.window)

    def with_dropout(self, *, attention: float, embedding: float) -> "BlockOptions":
        """These options with the rates that are None filled in."""
        return dataclasses.replace(
            self,
            attention_dropout=attention if self.attention_dropout is None else self.attention_dropout,
            embedding_dropout=embedding if self.embedding_dropout is None else self.embedding_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The shape of a model; vocabulary sizes are filled in from the tokenizers."""

    kind: Kind
    d_model: Count = 512
    num_heads: Count = 8
    num_layers: Count = 6
    d_ff: Count = 2048
    max_seq_length: Count = 5000
    dropout: Rate = 0.1
    vocab_size: Natural = 0
    """Of the language model, or of the target side."""
    src_vocab_size: Natural = 0
    """Of the source side of an encoder–decoder."""
    options: BlockOptions = BlockOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        given, rotary = self.options.head_dim is not None, self.options.positions == "rotary"
        rule = f"divisible by num_heads ({self.num_heads}) unless there is a head_dim"
        _require(given or self.d_model % self.num_heads == 0, "d_model", rule, self.d_model)
        even = not rotary or (self.options.head_dim or self.d_model // self.num_heads) % 2 == 0
        rule = "even with rotary positions"
        _require(not given or even, "options.head_dim", rule, self.options.head_dim)
        rule = f"an even multiple of num_heads ({self.num_heads}) with rotary positions"
        _require(given or even, "d_model", rule, self.d_model)
        if self.kind == "encoder_decoder":
            self.options.check_for_pairs("options.")
        kv_heads = self.options.num_kv_heads or self.num_heads
        rule = f"a divisor of num_heads ({self.num_heads})"
        _require(self.num_heads % kv_heads == 0, "options.num_kv_heads", rule, kv_heads)
        if (experts := self.options.experts) is not None:
            if experts.on("decoder"):
                experts.check_for_decoders("options.experts.")
            rule = "both or decoder where there is no encoder"
            lost = self.kind == "decoder_only" and experts.side == "encoder"
            _require(not lost, "options.experts.side", rule, experts.side)
            rule = f"at most num_layers ({self.num_layers})"
            _require(experts.every <= self.num_layers, "options.experts.every", rule, experts.every)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Checked):
    """How text becomes token ids; trained on the training text unless `path` names one that exists."""

    kind: Literal["byte", "char", "bpe"] = "bpe"
    vocab_size: int = 8000
    """Of BPE, special tokens and the 256 bytes included; the other kinds have the size they have."""
    joint: bool = True
    """One tokenizer for both sides of pairs, or one each."""
    path: str | None = None
    """A trained tokenizer's file or folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "bpe":
            _require(self.vocab_size >= 300, "vocab_size", "at least 300 for BPE", self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """What to train on; which fields count depends on `kind`.

    `text` reads files, folders or globs; `pairs` two files of equal length or one of tab-separated columns;
    `phrases` makes numbers and dates with their translations; `stdlib` is Python's own standard library; `none` is what
    a run has that was not trained here.
    """

    kind: Literal["text", "pairs", "phrases", "stdlib", "none"]
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
    test: Rate = 0.0
    """text: the last share of the characters, kept for `evaluate --split test`; with hold_out "tail".

    `valid` is then the first share: next to the test part, it would take its names and story from the training."""
    hold_out: Literal["seeded", "tail"] = "seeded"
    """What a fraction takes: documents or lines drawn by the seed, the last characters (text; see `test`) or lines."""
    document: Literal["file", "line", "paragraph"] = "file"
    """text: what a document is; it stands between the tokens for beginning and end of sequence."""
    packing: Literal["crops", "documents"] = "crops"
    """text: windows cut anywhere, or whole documents side by side that do not attend across their borders."""
    language: Literal["de", "fr", "cs"] = "de"
    """phrases: the language to translate to, of `de`, `fr` and `cs`."""
    num_examples: Count = 50_000
    """phrases: how many make an epoch."""
    max_bytes: Count | None = None
    """stdlib, text: stop after so many bytes."""
    tokenized: bool = False
    """pairs: words and punctuation stand apart already, and BLEU counts them as they stand (sacrebleu's `tok:none`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.valid
        if not isinstance(valid, str):
            rule = "a file, or a fraction between 0 and 1"
            _require(not isinstance(valid, bool) and 0 < valid < 1, "valid", rule, valid)
        pairs_by_two = self.source is not None and self.target is not None
        if self.kind == "text":
            _require(bool(self.files), "files", "one file or more", self.files)
        if self.test:
            tail = self.kind in ("text", "stdlib") and self.hold_out == "tail" and not isinstance(valid, str)
            _require(tail, "test", 'left out without a text, a fraction as valid and hold_out "tail"', self.test)
            _require(tail and self.test + float(valid) < 1, "test", f"below 1 − valid ({valid})", self.test)
        if self.kind == "pairs":
            rule = "given together with target, or files given instead"
            _require(pairs_by_two != bool(self.files), "source", rule, self.source)
            both = (self.valid_source is None) == (self.valid_target is None)
            _require(both, "valid_source", "given together with valid_target", self.valid_source)
            both = (self.test_source is None) == (self.test_target is None)
            _require(both, "test_source", "given together with test_target", self.test_source)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """How to train; counts of steps are optimizer steps, and one that is skipped counts as a step."""

    max_steps: Count = 1000
    max_epochs: Count | None = None
    """Stop after so many passes through the data, if that comes first."""
    max_minutes: Positive | None = None
    """Stop after so many minutes of training, if that comes first; `schedule` does not know of it."""
    batch_tokens: Count = 4096
    """Tokens of one micro-batch: rows × longest side, padding included."""
    accumulate: Count = 1
    """Micro-batches of one step; the loss is the mean over all their real tokens."""
    context: Count = 256
    """Language models: tokens of one window."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices between activations, AdamW for all else, under one learning rate and decay."""
    learning_rate: Positive = 1e-3
    schedule: Literal["cosine", "inverse_sqrt", "linear", "constant"] = "cosine"
    """After the warm-up: to `min_learning_rate` by cosine or line, by 1/√step (Vaswani et al. 2017, §5.3), or flat."""
    warmup_steps: Natural = 100
    min_learning_rate: Weight = 0.0
    weight_decay: Weight = 0.1
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    adam_eps: Positive = 1e-8
    clip_norm: Positive | None = 1.0
    max_skipped: Natural = 10
    """So many of any 128 steps may be skipped, since they are not finite or a spike; one more ends the run."""
    label_smoothing: Rate = 0.0
    r_drop: Positive | None = None
    """Each batch is trained on twice, under different dropout, with this weight on how far the predictions are apart
    (Liang et al. 2021, α); a step takes twice as long."""
    zero_start: bool = False
    """The vector of the token that a decoder reads first is zero and stays so, as Marian has it; exports need that."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: both are timed on the first batch and the faster one is written into the run."""
    threads: Count | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each has the whole model (DDP), or a part of every weight and its state (FSDP2)."""
    eval_every: Count = 200
    """Steps between evaluations and checkpoints."""
    log_every: Count = 10
    keep_best: Literal["loss", "bleu", "chrf", "exact_match"] = "loss"
    """The metric that chooses the best checkpoint."""
    patience: Count | None = None
    """Stop after so many evaluations without a new best one by `keep_best`."""
    samples: Natural = 3
    """So many are decoded at each evaluation, into samples.md; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"at most learning_rate ({self.learning_rate})"
        _require(self.min_learning_rate <= self.learning_rate, "min_learning_rate", rule, self.min_learning_rate)


@dataclass(frozen=True, kw_only=True)
class InitConfig(Checked):
    """Where the weights come from, when not from chance."""

    from_: str | None = None
    """A run whose weights and tokenizer to start from, with a fresh optimizer."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Checked):
    """How a run decodes where nobody says otherwise: in `evaluate`, for samples during training, when it is used."""

    beam: Count = 4
    length_penalty: Weight = 1.0
    """α in score / n^α, n the number of generated tokens, the end token included."""
    patience: Patience | None = None
    """A search ends when no better text can come, or when beam · patience have finished (Kasai et al. 2022).

    1 is several times as fast, and may end before the best text of a sure model does: it finishes poor ones first."""
    max_new_tokens: Count = 200
    temperature: Weight | None = None
    """Language models: of draws, 0 is greedy; None: 1, or in a run that starts from another one as that says."""
    top_k: Count | None = None
    """Draw from so many of the likeliest."""
    top_p: Share | None = None
    """Draw from the fewest that have so much of the probability."""
    repetition_penalty: Positive | None = None
    """Above 1: what came before comes less often."""
    no_repeat_ngram: Count | None = None
    """So many tokens in a row never come again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience == math.inf:  # says the same as nothing, but is no number in JSON
            object.__setattr__(self, "patience", None)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """A recipe: all that a run is made of."""

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    init: InitConfig = InitConfig()
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = (self.model.kind == "encoder_decoder") == (self.data.kind in ("pairs", "phrases"))
        _require(
            fits or self.data.kind == "none", "data.kind", f"one that {self.model.kind} can learn from", self.data.kind
        )
        if self.model.kind == "decoder_only":
            rule = f"at most model.max_seq_length ({self.model.max_seq_length})"
            _require(self.train.context <= self.model.max_seq_length, "train.context", rule, self.train.context)
            rule = f"at least train.context ({self.train.context})"
            _require(self.train.batch_tokens >= self.train.context, "train.batch_tokens", rule, self.train.batch_tokens)
        if self.model.kind == "encoder_decoder" and self.model.options.tie_embeddings:
            _require(self.tokenizer.joint, "tokenizer.joint", "true with tied embeddings", self.tokenizer.joint)
