"""Runs that are made of what came from elsewhere, and what goes elsewhere from runs."""

from pathlib import Path

import torch

from triglot.checkpoint import Loaded, Progress, load_model, save_checkpoint, step_name
from triglot.config import DataConfig, RunConfig, TrainConfig
from triglot.errors import CheckpointError, ConfigError, require
from triglot.files import replacing, write_bytes, write_json
from triglot.interop import ctranslate2, gguf, marian, words
from triglot.interop.convert import family_for, read_model
from triglot.interop.links import theirs_of
from triglot.interop.tensors import write_tensors
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer
from triglot.recipe import to_dict
from triglot.tokenizer import Tokenizers
from triglot.tokenizer.files import Files
from triglot.tokenizer.foreign import Foreign


def is_foreign(path: Path) -> bool:
    """Whether a path is a checkpoint of another library, and not a run."""
    alone = path.is_file() and path.suffix in (".gguf", ".bin")
    return alone or ((path / "config.json").is_file() and not (path / "checkpoints").is_dir())


def load_foreign(path: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    """The model of a checkpoint with its tokenizers, and settings as a run would have them.

    Raises CheckpointError for what does not fit or is damaged.
    """
    rule = "a run, a folder of transformers with config.json, a GGUF file or a .bin of llama2.c"
    require(path.is_file() or (path / "config.json").is_file(), "the checkpoint", rule, str(path), CheckpointError)
    packed = gguf.read(path) if path.suffix == ".gguf" else None
    model, config = read_model(path, dtype, packed)
    tokenizers = _tokenizers(path) if packed is None else Tokenizers.from_gguf(packed.values, path)
    train = TrainConfig(context=min(TrainConfig.context, config.max_seq_length))
    run = RunConfig(model=config, data=DataConfig(kind="none"), train=train, generation=tokenizers.generation)
    return Loaded(model, run, tokenizers)


def _tokenizers(path: Path) -> Tokenizers:
    if path.suffix == ".bin":
        beside = sorted(path.parent.glob("*.model"))
        rule = "one .model of SentencePiece in its folder"
        require(len(beside) == 1, f"the tokenizer of {path}", rule, [one.name for one in beside], CheckpointError)
        return Tokenizers.from_sentencepiece(beside[0])
    return Tokenizers.load(path)


def load_any(
    path: Path, which: str = "best", device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """The model of a run's checkpoint `which`, or of another library's checkpoint."""
    if not is_foreign(path):
        return load_model(path, which, device, dtype)
    require(which == "best", "which", "left out for another library's checkpoint", which, ConfigError)
    found = load_foreign(path, torch.float32 if dtype is None else dtype)
    return found._replace(model=found.model.to(device))


def _require_new(out: Path) -> None:
    require(not out.exists(), "DST", "new, since nothing is overwritten", str(out), ConfigError)


def to_run(source: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint as a run without steps, to be used, measured, or trained on from as `init.from`."""
    _require_new(out)
    require(
        not (source / "checkpoints").is_dir(), "SRC", "no run, since it would be one again", str(source), ConfigError
    )
    found = load_foreign(source, dtype)
    out.mkdir(parents=True)
    found.tokenizers.save(out)
    write_json(out / "config.json", to_dict(found.config))
    save_checkpoint(out, step_name(0), found.config, found.model, Progress())


def to_transformers(run: Path, out: Path, which: str = "best", dtype: torch.dtype = torch.float32) -> None:
    """Write a run, or a checkpoint, as a folder that transformers loads."""
    _require_new(out)
    model, config, tokenizers = load_any(run, which, dtype=dtype)
    shape, own = config.model, not isinstance(tokenizers.target, Foreign)
    to_marian = own and isinstance(model, Transformer) and shape.options.positions == "sinusoidal"
    files, ids = words.of_transformers(tokenizers, config, start_behind=to_marian)
    if to_marian:
        assert isinstance(model, Transformer)
        model, shape = marian.with_start_behind(model, shape, tokenizers.target.ids.start)
        model.to(dtype)
    family, values = family_for(shape)
    out.mkdir(parents=True)
    write_json(out / "config.json", values | ids | {"dtype": str(dtype).removeprefix("torch.")})
    _write_files(out, files)
    write_tensors(out, theirs_of(model, family.links(shape)))


def to_gguf(run: Path, out: Path, numbers: str, which: str = "best") -> None:
    """Write a run, or a checkpoint, of Llama's kind as a file that llama.cpp loads."""
    _require_new(out)
    model, config, tokenizers = load_any(run, which)
    require(config.model.kind == "decoder_only", "model.kind", "decoder_only for GGUF", config.model.kind, ConfigError)
    assert isinstance(model, DecoderLLM)
    kind, known = family_for(config.model)[1]["model_type"], ", ".join(gguf.ARCHITECTURES)
    require(kind in gguf.ARCHITECTURES, "a model for GGUF", f"one of {known}", kind, CheckpointError)
    require(not config.model.options.bias, "options.bias", "false for GGUF", True, CheckpointError)
    with replacing(out) as partial:
        gguf.write(partial, model, config.model, numbers, words.of_gguf(tokenizers, config))


def to_ctranslate2(run: Path, out: Path, which: str = "best") -> None:
    """Write a run, or a checkpoint, as a folder that CTranslate2 loads, with the tokenizer beside it."""
    _require_new(out)
    model, config, tokenizers = load_any(run, which)
    ids, target = tokenizers.target.ids, tokenizers.target.names
    unknown = tokenizers.target.specials.get("unk_token") if isinstance(tokenizers.target, Foreign) else None
    said = ctranslate2.Words(tokenizers.source.names, target, target[ids.start], target[ids.eos], unknown or target[0])
    ctranslate2.write(model, out, said)
    _write_files(out, words.of_ctranslate2(tokenizers, config))


def _write_files(out: Path, files: Files) -> None:
    for name, content in files.items():
        write_bytes(out / name, content)
