"""Tokenizers of others say what `transformers` makes of the same folder, and travel as the files that they are."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.config import GenerationConfig
from triglot.errors import CheckpointError, ConfigError, DataError
from triglot.tokenizer import SpecialIds, Tokenizers

transformers = pytest.importorskip("transformers")
FAMILIES = ("gpt2", "llama3", "qwen", "llama2", "t5", "bart")
SPELLED = ["<|endoftext|>", "<|im_end|>", "<think>", "<s>", "</s>", "<unk>", "<0x41>", "▁", " .", " n't", "  the dog"]
SENTENCES = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), max_size=9), st.sampled_from(SPELLED)), max_size=5
).map("".join)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, family):
    folder = family(request.param)
    return Tokenizers.load(folder).target, transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=100)
@given(text=SENTENCES)
def test_ids_are_those_of_transformers(both, text):
    ours, theirs = both
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode_whole([text, "a"]) == [theirs.encode(text), theirs.encode("a")]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_the_text_of_any_ids_is_that_of_transformers_in_pieces_too(both, data):
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12)) + ours.encode(data.draw(SENTENCES))
    text = ours.decode(ids)
    assert text == theirs.decode(ids, skip_special_tokens=True)
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert stream.flush() == ""


def test_what_a_stream_tells_early_is_told_as_early_as_it_can_be(family):
    for name in ("gpt2", "llama2"):
        tokenizer = Tokenizers.load(family(name)).target
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in tokenizer.encode("the dog the")]
        assert "" not in pieces


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("gpt2", SpecialIds(bos=None, ends=(0,), start=0, banned=())),
        ("llama3", SpecialIds(bos=0, ends=(2, 1), start=0, banned=())),
        ("qwen", SpecialIds(bos=None, ends=(2, 0), start=0, banned=())),
        ("llama2", SpecialIds(bos=1, ends=(2,), start=1, banned=())),
        ("t5", SpecialIds(bos=None, ends=(1,), start=0, banned=())),
        ("bart", SpecialIds(bos=0, ends=(2,), start=2, forced=(0,), banned=())),
    ],
)
def test_ids_are_for_what_the_files_say(family, name, ids):
    assert Tokenizers.load(family(name)).target.ids == ids


def test_sources_and_targets_are_framed_as_transformers_frames_them(family):
    for name in ("t5", "bart"):
        pair, theirs = Tokenizers.load(family(name)), transformers.AutoTokenizer.from_pretrained(family(name))
        assert pair.joint
        assert pair.encode_sources(["the dog"], [None]) == [theirs.encode("the dog")]
        assert [*pair.encode_targets(["the dog"])[0], pair.target.ids.eos] == theirs.encode("the dog")


def test_a_prompt_is_read_as_transformers_reads_it_and_nothing_begins_a_document(family):
    for name in ("gpt2", "llama3", "qwen", "llama2"):
        ours, theirs = Tokenizers.load(family(name)).target, transformers.AutoTokenizer.from_pretrained(family(name))
        for documents in (True, False):
            assert ours.encode_prompts(["the", ""], documents=documents) == [theirs.encode("the"), [ours.ids.start]]


def test_the_files_travel_byte_for_byte_and_say_the_same(family, tmp_path):
    for name in FAMILIES:
        folder = tmp_path / name
        folder.mkdir()
        tokenizers = Tokenizers.load(family(name))
        tokenizers.save(folder)
        for file in family(name).iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
        again = Tokenizers.load(folder)
        assert again.target.digest == tokenizers.target.digest
        assert (again.target.ids, again.generation) == (tokenizers.target.ids, tokenizers.generation)
        assert again.target.encode("the dog") == tokenizers.target.encode("the dog")


def test_generation_config_json_says_how_to_decode(family):
    found = {name: Tokenizers.load(family(name)).generation for name in FAMILIES}
    assert found["gpt2"] == found["llama2"] == found["t5"] == GenerationConfig()
    assert found["llama3"] == GenerationConfig(temperature=0.6, top_p=0.9)
    assert found["qwen"] == GenerationConfig(top_k=20, repetition_penalty=1.05)
    assert found["bart"] == GenerationConfig(beam=3, no_repeat_ngram=3, patience=1.0, max_new_tokens=61)


def changed(folder, to, name, **values):
    """A copy of a folder in which one file says something else."""
    shutil.copytree(folder, to)
    before = json.loads((to / name).read_text(encoding="utf-8")) if (to / name).exists() else {}
    (to / name).write_text(json.dumps(before | values), encoding="utf-8")
    return to


def test_unknown_keys_are_kept_and_mean_nothing(family, tmp_path):
    folder = changed(family("llama3"), tmp_path / "other", "generation_config.json", guidance="x", do_sample=False)
    tokenizers = Tokenizers.load(folder)
    assert tokenizers.generation == GenerationConfig(temperature=0.0)
    assert b'"guidance": "x"' in tokenizers.target.files["generation_config.json"]


def test_an_older_folder_says_in_config_json_how_its_model_decodes(family, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(family("bart"), folder)
    (folder / "generation_config.json").rename(folder / "config.json")
    changed(folder, tmp_path / "typed", "config.json", model_type="bart", d_model=7)
    assert Tokenizers.load(tmp_path / "typed").target.ids == Tokenizers.load(family("bart")).target.ids
    assert b"d_model" not in Tokenizers.load(tmp_path / "typed").target.files["generation_config.json"]


def test_special_tokens_map_and_a_template_in_a_file_of_its_own_are_read(family, tmp_path):
    folder = changed(family("qwen"), tmp_path / "one", "tokenizer_config.json", eos_token=None, chat_template=None)
    changed(folder, tmp_path / "two", "special_tokens_map.json", eos_token={"content": "<|im_end|>"})
    config = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "two" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "two" / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}", encoding="utf-8")
    tokenizer = Tokenizers.load(tmp_path / "two").target
    assert tokenizer.ids == Tokenizers.load(family("qwen")).target.ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "é"}]) == "<|im_end|>é"


def test_a_conversation_is_the_one_of_transformers(family):
    ours, theirs = Tokenizers.load(family("qwen")).target, transformers.AutoTokenizer.from_pretrained(family("qwen"))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the dog?"}]
    for more in (True, False):
        text = ours.apply_chat_template(chat, add_generation_prompt=more)
        assert text == theirs.apply_chat_template(chat, add_generation_prompt=more, tokenize=False)
        ids = theirs.apply_chat_template(chat, add_generation_prompt=more, return_dict=False)
        assert ours.encode(text) == ids


def test_without_a_template_there_is_no_conversation(family):
    with pytest.raises(ConfigError, match="chat template"):
        Tokenizers.load(family("gpt2")).target.apply_chat_template([{"role": "user", "content": "a"}])


def test_ids_outside_the_vocabulary_are_refused(both):
    with pytest.raises(DataError, match="`token id` must be between 0 and"):
        both[0].decode([both[0].vocab_size])
    with pytest.raises(DataError, match="lone surrogate"):
        both[0].encode("ab\ud83d")


def rewritten(change):
    """A tokenizer.json of which the values are changed."""

    def of(folder):
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")

    return of


def twice(folder):
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert text.count('"t":') == 1
    (folder / "tokenizer.json").write_text(text.replace('"t":', '"!": 9, "t":'), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:99]), "tokenizer.json is"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json is damaged"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json is damaged"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "model of tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("[" * 99999), "tokenizer.json is damaged"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}'), "eos_token` must be a token of"),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 999}'),
            "eos_token_id in generation_con",
        ),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, true]}'), "eos_token_id in genera"),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 2'),
            "generation_config.json is damaged",
        ),
        (twice, "'!' twice"),
        (rewritten(lambda v: v["model"]["vocab"].update({"!!!": 7})), "id 7"),
        (rewritten(lambda v: v["model"].update(merges=[["zzz", "z"]])), "tokenizer.json is damaged"),
        (rewritten(lambda v: v.update(decoder={"type": "BPEDecoder", "suffix": "</w>"})), "the decoder of tokenizer"),
        (rewritten(lambda v: v.update(decoder=None)), "the decoder of tokenizer"),
    ],
)
def test_a_bad_file_is_named(family, tmp_path, change, told):
    folder = tmp_path / "qwen"
    shutil.copytree(family("qwen"), folder)
    change(folder)
    with pytest.raises(CheckpointError, match=f"qwen: .*{told}"):
        Tokenizers.load(folder)


def test_a_piece_of_which_there_are_two_is_refused(family, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(family("t5"), folder)
    rewritten(lambda v: v["model"]["vocab"].append(v["model"]["vocab"][9]))(folder)
    with pytest.raises(CheckpointError, match="without doubles"):
        Tokenizers.load(folder)


def test_bad_settings_of_decoding_are_refused(family, tmp_path):
    folder = changed(family("llama3"), tmp_path / "bad", "generation_config.json", top_p=1.5)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: `top_p` must be above 0 and at most 1"):
        _ = Tokenizers.load(folder).generation
