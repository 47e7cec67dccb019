"""A trained run behind its calls: `translate` and `alternatives`, `generate` and `stream`, `score` and `score_file`.

What a text becomes does not depend on its company: a request alone and in any mix, order or batch gets the same tokens
and the same log-probabilities, bit for bit on a processor and, but for translations and experts, on a GPU.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from triglot.config import RunConfig
from triglot.distributed.team import device_here
from triglot.errors import ConfigError, require
from triglot.generation import scoring, sentences, texts
from triglot.generation.options import Sampling, Searching, made
from triglot.generation.ready import Ready, Tags
from triglot.generation.results import Alternative, Generation, Hypothesis
from triglot.generation.texts import Prompt, Stream
from triglot.generation.workers import Workers
from triglot.interop.runs import load_any
from triglot.layers.packed import Precision
from triglot.objective import Model
from triglot.tokenizer import Tokenizers
from triglot.typed import typed


@typed
def load(
    run: str | Path,
    *,
    which: str = "best",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision = "fp32",
    workers: int | None = None,
    draft: str | Path | None = None,
    compiled: bool | None = None,
) -> "Engine":
    """The engine of a run's checkpoint `which` (best, last, or a number of steps), or of another library's checkpoint.

    Without `device` it is on the GPU if there is one. `precision` is that of decoding: on a processor the weights are
    packed for it, on a GPU bf16 is the type of the model and int8 is refused. With `workers` above 1 so many processes
    translate, each on one core (a program that loads such an engine needs `if __name__ == "__main__":`). `draft` is the
    run of a smaller model with the same tokens, which guesses where a text is generated with `speculate`. With
    `compiled` texts go on by compiled code: on a processor the fastest for one text
    (`generation/compiled.py`), on a GPU for any number (`generation/captured.py`). Where `compiled` is left out, a
    processor decodes by kernels that a C++ compiler makes here in seconds (`generation/kernels.py`), if there is one
    (and AVX2), and where it is False, by none. Translations are never faster than by them.
    """
    where = device_here(device)
    on_processor = where.type == "cpu"
    if precision == "bf16" and not on_processor:
        precision, dtype = "fp32", torch.bfloat16
    model, config, tokenizers = load_any(Path(run), which, where, dtype)
    pairs, pool = config.model.kind == "encoder_decoder", None
    rule = "one that translates, for `workers` to share in"
    require(pairs or workers in (None, 1), "the model of the run", rule, config.model.kind, ConfigError)
    require(not pairs or draft is None, "draft", "left out for a run that translates", draft, ConfigError)
    if workers is not None and workers != 1:
        fits = on_processor and dtype in (None, torch.float32)
        require(fits, "workers", "1 unless the model is on a processor, in fp32", workers, ConfigError)
        if compiled is None:  # all of them with kernels, or all without
            prepared = Ready(model, config, tokenizers, precision).prepared
            compiled = prepared is not None and prepared.by_kernels
        pool = Workers(partial(sentences.worker_search, Path(run), which, precision, compiled), workers)
    guesses = None if draft is None else Ready(*load_any(Path(draft), "best", where), precision, compiled=compiled)
    return Engine(model, config, tokenizers, precision=precision, workers=pool, draft=guesses, compiled=compiled)


class Engine:
    """A model in evaluation mode with its config and tokenizers; what a call does not say, `config.generation` says.

    The model is made ready to decode when it is first asked to, and its weights must neither change nor move then.
    """

    def __init__(
        self,
        model: Model,
        config: RunConfig,
        tokenizers: Tokenizers,
        *,
        precision: Precision = "fp32",
        workers: Workers | None = None,
        draft: Ready | None = None,
        compiled: bool | None = None,
        in_training: bool = False,
    ) -> None:
        self.model, self.config, self.tokenizers = model, config, tokenizers
        self._ready = Ready(model, config, tokenizers, precision, draft, compiled=compiled, in_training=in_training)
        self._workers = workers
        self._find = partial(sentences.search_all, self._ready) if workers is None else workers.search

    @property
    def precision(self) -> str:
        """What decoding multiplies in: without kernels small projections of int8 stay in bf16 or fp32."""
        return self._ready.multiplies_in

    def close(self) -> None:
        """End the processes that translate, which otherwise end with the program."""
        if self._workers is not None:
            self._workers.pool.shutdown(cancel_futures=True)

    @typed
    def translate(
        self,
        lines: Sequence[str],
        *,
        tags: Tags = None,
        prefixes: Sequence[str] | None = None,
        first_line: int = 1,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """The `nbest` best translations of each line, best first; an empty line becomes one empty text.

        `tags` is the target tag of all lines, or of each; `prefixes` are how the translations begin; options are those
        of `Searching`. Of a line that is longer than the model reads, the beginning is translated where `too_long` is
        "cut". Raises DataError for such a line otherwise, counting from `first_line`, for an unknown tag, and for none
        where the run was trained with tags; ConfigError for options that can not be.
        """
        _ = self._ready.translator
        how = made(Searching, options, self.config.generation)
        return sentences.translate(
            self._ready, self._find, lines, how, tags=tags, prefixes=prefixes, first_line=first_line
        )

    @typed
    def alternatives(
        self, line: str, prefix: str = "", count: int = 5, *, tag: str | None = None, **options: Any
    ) -> list[Alternative]:
        """The `count` likeliest tokens behind `prefix` in a translation of `line`, falling.

        Each comes with the best translation that goes on with it; options are those of `Searching`.
        """
        _ = self._ready.translator
        how = made(Searching, {"nbest": 1, **options}, self.config.generation)
        require(how.nbest == 1, "nbest", "1, one for each alternative", how.nbest, ConfigError)
        return sentences.alternatives(self._ready, self._find, line, prefix, count, how, tag)

    @typed
    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        """What follows each prompt, up to the end of its document, a stop string or `max_new_tokens`.

        A prompt is a text, or a conversation: a list of messages, such as {"role": "user", "content": "Hello!"}, which
        the model's chat template spells, and which its answer follows. Options are those of `Sampling`; what is None is
        as the run says. An empty prompt begins a document. With n above 1 the texts of a prompt stand
        side by side, so that text k of prompt i is number i · n + k, and draws from the seed `seed + i · n + k`.
        Raises ConfigError for options that can not be, and for what does not fit the context where `past_context` is
        "error".
        """
        _ = self._ready.writer
        how = made(Sampling, options, self.config.generation)
        drafts, rules = texts.drafts_of(self._ready, prompts, how)
        texts.write_all(self._ready, drafts, how, rules)
        return [draft.result(alternatives=how.top_logprobs > 0) for draft in drafts]

    @typed
    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """The text that `generate` returns for one prompt, as it comes, and `ended`, which says why it did.

        Pieces are whole characters, none of them of a stop string that comes to be complete.
        """
        _ = self._ready.writer
        how = made(Sampling, options, self.config.generation)
        require(how.n == 1, "n", "1 in a stream", how.n, ConfigError)
        require(how.top_logprobs == 0, "top_logprobs", "0 in a stream of text", how.top_logprobs, ConfigError)
        drafts, rules = texts.drafts_of(self._ready, [prompt], how)
        return Stream(drafts[0], texts.write(self._ready, drafts, how, rules))

    @overload
    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        /,
        *,
        tags: Tags = None,
        too_long: scoring.TooLong = "error",
        first: int = 1,
    ) -> list[scoring.TextScore]: ...
    @overload
    def score(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        /,
        *,
        end: bool = False,
        past_context: scoring.PastContext = "error",
        first: int = 1,
    ) -> list[scoring.TextScore]: ...
    def score(self, *texts: Any, **options: Any) -> list[scoring.TextScore]:
        """log p of each token: of targets given their sources, or of texts behind their prompts.

        Probabilities are the model's own in its own type, whatever the precision of decoding; see `score_pairs` and
        `score_texts`.
        """
        pairs = self.config.model.kind == "encoder_decoder"
        known = ("tags", "too_long", "first") if pairs else ("end", "past_context", "first")
        for name in options:
            require(name in known, "the option", f"one of {', '.join(known)}", name, ConfigError)
        rule = "2 (sources and targets)" if pairs else "1 or 2 (texts, and their prompts)"
        require(pairs + 1 <= len(texts) <= 2, "the number of lists to score", rule, len(texts), ConfigError)
        if pairs:
            return scoring.score_pairs(self._ready.translator, self.tokenizers, *texts, **options)
        return scoring.score_texts(self._ready.writer, self.config, self.tokenizers.target, *texts, **options)

    @typed
    def score_file(self, path: str | Path, *, context: int | None = None) -> scoring.FileScore:
        """Perplexity and bits per byte of a whole file of running text; see `scoring.score_file`."""
        model, tokenizer = self._ready.writer, self.tokenizers.target
        return scoring.score_file(model, self.config, tokenizer, Path(path), context=context)
