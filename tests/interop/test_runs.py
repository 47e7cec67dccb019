"""Whoever has a checkpoint comes in, trains on, and leaves again for where the model is served."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")

from triglot.checkpoint import load_model  # noqa: E402
from triglot.cli import app  # noqa: E402
from triglot.config import (  # noqa: E402
    BlockOptions,
    DataConfig,
    ExpertOptions,
    InitConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from triglot.errors import CheckpointError, ConfigError  # noqa: E402
from triglot.evaluation import evaluate  # noqa: E402
from triglot.generation.engine import load  # noqa: E402
from triglot.interop.gguf import read as read_gguf  # noqa: E402
from triglot.interop.runs import to_ctranslate2, to_gguf, to_run, to_transformers  # noqa: E402
from triglot.training.session import train  # noqa: E402
from triglot.upcycling import upcycle  # noqa: E402

TEXT = "the quick brown dog\nein Satz, ein Wort; der Hund und die Katze\n" * 40
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": [1, 2],
}  # fmt: skip
KINDS = {
    "llama3": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "qwen": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA | {"bos_token_id": None, "eos_token_id": [2, 0]}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}),
}  # fmt: skip
PROMPTS = ["the dog", "ein Wort", "the quick"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "repetition_penalty": 1.0}


@pytest.fixture(autouse=True)
def without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def checkpoint_of(name, family, folder):
    """A folder of transformers with random weights."""
    kind, config, settings = KINDS[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(family(name))
    torch.manual_seed(1)
    model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=len(tokenizer), **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    for file in family(name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def continued(folder, ends=None, **how):
    """What transformers writes after each prompt, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(told.values())
    texts, how = [], {} if ends is None else {"eos_token_id": ends}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, repetition_penalty=1.0,
            temperature=None, top_k=None, top_p=None, pad_token_id=0, **how,
        )  # fmt: skip
        texts.append(tokenizer.decode(found[0, ids.size(1) :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("name", KINDS)
def test_an_adopter_comes_in_trains_on_and_leaves(name, family, tmp_path):
    folder = checkpoint_of(name, family, tmp_path / "theirs")
    assert [one.text for one in load(folder).generate(PROMPTS, **GREEDY)] == continued(folder)
    to_run(folder, tmp_path / "import")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    imported = load_model(tmp_path / "import").config
    before = evaluate_on(text, imported, tmp_path, steps=1, rate=1e-9, name="before")
    after = evaluate_on(text, imported, tmp_path, steps=25, rate=1e-2, name="after")
    assert after < before - 1
    run, out = tmp_path / "after", tmp_path / "out"
    to_transformers(run, out)
    told = [one.text for one in load(run).generate(PROMPTS, **GREEDY)]
    assert continued(out) == told
    assert [one.text for one in load(out).generate(PROMPTS, **GREEDY)] == told
    assert told != continued(folder)


def evaluate_on(text, imported, folder, *, steps, rate, name):
    config = RunConfig(
        model=replace(imported.model, vocab_size=0),
        data=DataConfig(kind="text", files=(str(text),), document="line", valid=0.1),
        train=TrainConfig(
            max_steps=steps, warmup_steps=0, learning_rate=rate, batch_tokens=300, context=31, eval_every=steps,
            samples=0, precision="fp32",
        ),
        init=InitConfig(from_=str(folder / "import")),
    )  # fmt: skip
    train(config, folder / name, device="cpu")
    return evaluate(folder / name)["loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A translator as Marian's are, and a file of its pairs."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [f"the {a} {b} ran\tder {b} {a} lief\n" for a in ("old", "red", "big") for b in ("dog", "cat", "fox", "car")]
    (folder / "pairs.tsv").write_text("".join(rows * 6), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(
            kind="encoder_decoder", d_model=32, num_heads=2, num_layers=2, d_ff=64, max_seq_length=64, dropout=0.0,
            options=BlockOptions(tie_embeddings=True, output_bias=False),
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=330, joint=True),
        data=DataConfig(kind="pairs", files=(str(folder / "pairs.tsv"),), valid=0.1),
        train=TrainConfig(
            max_steps=120, warmup_steps=20, learning_rate=5e-3, batch_tokens=600, eval_every=120, samples=0,
            precision="fp32", zero_start=True, label_smoothing=0.1,
        ),
    )  # fmt: skip
    train(config, folder / "run", device="cpu")
    sources = [row.split("\t")[0] for row in rows]
    return folder / "run", [*sources, "the red dog", "dog dog cat the", "12"]


@pytest.mark.parametrize("beam", [1, 4])
def test_a_translator_that_is_trained_here_translates_the_same_as_marian(trained, tmp_path, beam):
    run, sources = trained
    to_transformers(run, tmp_path / "hf")
    expected = [one[0].text for one in load(run).translate(sources, beam=beam, max_new_tokens=20)]
    assert len(set(expected)) > len(sources) // 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values())
    assert type(model).__name__ == "MarianMTModel"
    found = []
    for source in sources:
        ids = model.generate(**tokenizer(source, return_tensors="pt"), num_beams=beam, max_new_tokens=20)
        found.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert found == expected
    assert [one[0].text for one in load(tmp_path / "hf").translate(sources, beam=beam, max_new_tokens=20)] == expected


@pytest.mark.parametrize("way", ["own", "marian's"])
def test_ctranslate2_translates_the_same(trained, tmp_path, way):
    ctranslate2 = pytest.importorskip("ctranslate2")
    run, sources = trained
    if way == "own":
        to_ctranslate2(run, tmp_path / "ct2")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "ct2" / "tokenizer.json"))
    else:
        to_transformers(run, tmp_path / "hf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    theirs = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    rows = [tokenizer.convert_ids_to_tokens(tokenizer(source).input_ids) for source in sources]
    expected = [one[0].text for one in load(run).translate(sources, beam=4, max_new_tokens=20)]
    found = theirs.translate_batch(rows, beam_size=4, max_decoding_length=20, length_penalty=1.0)
    ids = [tokenizer.convert_tokens_to_ids(one.hypotheses[0]) for one in found]
    assert [tokenizer.decode(one, skip_special_tokens=True) for one in ids] == expected


def test_the_start_of_a_run_for_marian_is_zero_and_stays_so(trained):
    run, _ = trained
    model = load_model(run).model
    assert not model.encoder.embedding.tokens.weight[1].any()
    assert model.encoder.embedding.tokens.weight[2:].ne(0).any(-1).all()


def test_another_run_is_refused_by_name(trained, tmp_path):
    run, _ = trained
    model, config, tokenizers = load_model(run)
    from triglot.checkpoint import Progress, save_checkpoint, step_name
    from triglot.files import write_json
    from triglot.recipe import to_dict

    with torch.no_grad():
        model.encoder.embedding.tokens.weight[1] = 0.1
    other = tmp_path / "other"
    other.mkdir()
    tokenizers.save(other)
    write_json(other / "config.json", to_dict(config))
    save_checkpoint(other, step_name(0), config, model, Progress())
    with pytest.raises(CheckpointError, match="the vector that the decoder begins with"):
        to_transformers(other, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["llama3", "qwen"])
@pytest.mark.parametrize("numbers", ["F32", "F16", "Q8_0"])
def test_a_writer_goes_to_gguf_with_its_words(name, numbers, family, tmp_path):
    pytest.importorskip("gguf")
    folder = checkpoint_of(name, family, tmp_path / "theirs")
    before = load(folder)
    to_gguf(folder, tmp_path / "model.gguf", numbers)
    after = load(tmp_path / "model.gguf")
    cuts = {"llama3": "llama-bpe", "qwen": "qwen2"}[name]
    assert read_gguf(tmp_path / "model.gguf").values["tokenizer.ggml.pre"] == cuts  # which llama.cpp goes by
    for text in ("the dog, 1984", "<|im_end|>x", "déjà vu", "你好 🙂\r\n\n  x"):
        assert after.tokenizers.target.encode_whole([text]) == before.tokenizers.target.encode_whole([text])
    assert after.tokenizers.target.ids.ends[0] == before.tokenizers.target.ids.ends[0]
    if numbers == "F32":
        assert after.generate(PROMPTS, **GREEDY) == before.generate(PROMPTS, **GREEDY)
    texts = [one.text for one in after.generate(PROMPTS, **GREEDY)]
    ends = list(after.tokenizers.target.ids.ends)  # of which transformers reads the first
    assert continued(tmp_path, ends, gguf_file="model.gguf") == texts


def test_the_command_line_converts_both_ways_and_overwrites_nothing(family, tmp_path):
    folder = checkpoint_of("llama3", family, tmp_path / "theirs")

    def convert(*words):
        return CliRunner().invoke(app, ["convert", *map(str, words)])

    assert convert(folder, tmp_path / "run").exit_code == 0
    assert convert(tmp_path / "run", tmp_path / "hf", "--to", "hf").exit_code == 0
    assert convert(tmp_path / "run", tmp_path / "m.gguf", "--to", "gguf", "--numbers", "F32").exit_code == 0
    out = convert(tmp_path / "run", tmp_path / "ct2", "--to", "ctranslate2")
    assert out.exit_code == 0, out.stderr
    assert continued(tmp_path / "hf") == continued(folder)
    assert convert(folder, tmp_path / "half", "--dtype", "bfloat16").exit_code == 0
    assert convert(tmp_path / "half", tmp_path / "half-hf", "--to", "hf", "--dtype", "bfloat16").exit_code == 0
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert (tmp_path / "half-hf" / "model.safetensors").stat().st_size < 0.6 * size
    half, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half-hf", output_loading_info=True)
    assert (half.dtype, any(told.values())) == (torch.bfloat16, False)
    for word in ("--numbers", "--dtype"):
        value = "F32" if word == "--numbers" else "float16"
        refused = convert(folder, tmp_path / "none", "--to", "ctranslate2", word, value)
        assert (refused.exit_code, word in refused.stderr) == (2, True)
    again = convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    assert (again.exit_code, "`DST` must be new" in again.stderr) == (2, True)
    shown = CliRunner().invoke(
        app,
        ["generate", str(tmp_path / "m.gguf"), "--prompt", "the dog", "--temperature", "0", "--max-new-tokens", "5"],
    )
    assert shown.exit_code == 0, shown.stderr


def test_a_marian_folder_is_adapted_and_goes_on_to_ctranslate2(marian, trained, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, (run, sources) = tmp_path / "theirs", trained
    pad = len(load_tokens(marian)) - 1
    torch.manual_seed(1)
    config = transformers.MarianConfig(
        vocab_size=pad + 1, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        scale_embedding=True, activation_function="swish", pad_token_id=pad, decoder_start_token_id=pad,
        eos_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    transformers.MarianMTModel(config).save_pretrained(folder)
    for file in marian.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    to_run(folder, tmp_path / "import")
    imported = load_model(tmp_path / "import").config
    pairs = run.parent / "pairs.tsv"
    adapted = RunConfig(
        model=imported.model, data=DataConfig(kind="pairs", files=(str(pairs),), valid=0.1),
        train=TrainConfig(
            max_steps=80, warmup_steps=10, learning_rate=5e-3, batch_tokens=600, eval_every=80, samples=0,
            precision="fp32", zero_start=True,
        ),
        init=InitConfig(from_=str(tmp_path / "import")),
    )  # fmt: skip
    train(adapted, tmp_path / "adapted", device="cpu")
    engine = load(tmp_path / "adapted")
    expected = [one[0].text for one in engine.translate(sources, beam=4, max_new_tokens=20)]
    assert len(set(expected)) >= 4  # many words of theirs are unknown to that vocabulary
    to_ctranslate2(tmp_path / "adapted", tmp_path / "ct2")
    theirs = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    tokenizer = engine.tokenizers.target
    rows = [[tokenizer.names[token] for token in ids] for ids in engine.tokenizers.source.encode_whole(sources)]
    found = theirs.translate_batch(rows, beam_size=4, max_decoding_length=20, length_penalty=1.0)
    ids = [[tokenizer.names.index(token) for token in one.hypotheses[0]] for one in found]
    assert [tokenizer.decode(one) for one in ids] == expected
    to_transformers(tmp_path / "adapted", tmp_path / "hf")
    again = [one[0].text for one in load(tmp_path / "hf").translate(sources, beam=4, max_new_tokens=20)]
    assert again == expected


def load_tokens(folder):
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KINDS)
def test_ctranslate2_writes_the_same(name, family, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = checkpoint_of(name, family, tmp_path / "theirs")
    to_ctranslate2(folder, tmp_path / "ct2")
    engine = load(folder)
    tokenizer, theirs = engine.tokenizers.target, ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu")
    rows = [[tokenizer.names[token] for token in tokenizer.encode_whole([prompt])[0]] for prompt in PROMPTS]
    ends = [tokenizer.names[token] for token in tokenizer.ids.ends]
    found = theirs.generate_batch(rows, max_length=12, sampling_topk=1, end_token=ends, include_prompt_in_result=False)
    expected = [one.text for one in engine.generate(PROMPTS, **GREEDY)]
    assert [tokenizer.decode(one.sequences_ids[0]) for one in found] == expected


def test_what_llama_cpp_has_not_is_refused_by_name(trained, family, tmp_path):
    with pytest.raises(ConfigError, match="decoder_only for GGUF"):
        to_gguf(trained[0], tmp_path / "a.gguf", "F32")
    folder = checkpoint_of("gpt2", family, tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="one of llama, qwen2, qwen3, but is 'gpt2'"):
        to_gguf(folder, tmp_path / "a.gguf", "F32")
    dense = checkpoint_of("llama3", family, tmp_path / "llama")
    to_run(dense, tmp_path / "run")
    upcycle(tmp_path / "run", tmp_path / "experts", ExpertOptions(num_experts=4))
    with pytest.raises(CheckpointError, match="but is 'mixtral'"):
        to_gguf(tmp_path / "experts", tmp_path / "a.gguf", "F32")
    assert not (tmp_path / "a.gguf").exists()
    to_transformers(tmp_path / "experts", tmp_path / "mixtral")
    assert continued(tmp_path / "mixtral") == continued(dense)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{tmp}/none", "{tmp}/new"], "a folder of transformers with config.json"),
        (["{tmp}/run", "{tmp}/new"], "`SRC` must be no run"),
        (["{tmp}/llama", "{tmp}/new", "--checkpoint", "last"], "`--checkpoint` must be left out"),
        (["{tmp}/llama", "{tmp}/new.gguf"], "`DST` must be a name that ends in .gguf with --to gguf"),
        (["{tmp}/llama", "{tmp}/new", "--to", "gguf"], "`DST` must be a name that ends in .gguf with --to gguf"),
        (["{tmp}/classifier", "{tmp}/new"], "`architectures` must be"),
    ],
)
def test_what_can_not_be_converted_is_told(words, told, family, tmp_path):
    folder = checkpoint_of("llama3", family, tmp_path / "llama")
    to_run(folder, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "classifier")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    done = CliRunner().invoke(app, ["convert", *(word.format(tmp=tmp_path) for word in words)])
    assert (done.exit_code, told in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.glob("new*"))
