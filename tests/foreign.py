"""Small tokenizers of other libraries, each in a folder as their models have them."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox, the lazy dog; the the the. Don't! 1984 19 84\n" * 7,
    "déjà vu — žluťoučký kůň, größer; ein Satz, ein Wort.\r\n\t" * 5,
    "привет мир 你好世界 こんにちは שלום مرحبا 🙂👩‍👩‍👧 हिन्दी\n" * 3,
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501


def special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def bytes_of(specials: list[str], words: str | None, vocab_size: int = 400) -> library.Tokenizer:
    """BPE over bytes, of words as GPT-2 cuts them or as a regular expression does."""
    backend = library.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    cut = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special(*specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def gpt2() -> tuple[library.Tokenizer, dict[str, Any], dict[str, Any]]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return bytes_of(["<|endoftext|>"], None), config, {"bos_token_id": 0, "eos_token_id": 0}


def llama3() -> tuple[library.Tokenizer, dict[str, Any], dict[str, Any]]:
    backend = bytes_of(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], LLAMA_3)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]),
        ]
    )
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}
    said = {"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return backend, config, said


def qwen() -> tuple[library.Tokenizer, dict[str, Any], dict[str, Any]]:
    backend = bytes_of(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], LLAMA_3.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "chat_template": CHAT,
    }
    said = {"bos_token_id": 0, "eos_token_id": [2, 0], "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    return backend, config, said


def llama2() -> tuple[library.Tokenizer, dict[str, Any], dict[str, Any]]:
    """SentencePiece's BPE as Llama and Mistral have it: unknown letters as bytes, a space before the first word."""
    letters = sorted({letter for text in TEXTS for letter in text if letter.isascii()} - set(" \n\r\t"))
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "d"), ("o", "g"), ("▁d", "og"), ("▁", "▁")]
    vocabulary += ["".join(pair) for pair in merges]
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = library.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    return backend, config, {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096}


def t5() -> tuple[library.Tokenizer, dict[str, Any], dict[str, Any]]:
    backend = library.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = special("<pad>", "</s>", "<unk>", "<extra_id_0>")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}
    return backend, config, {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def bart() -> tuple[library.Tokenizer, dict[str, Any], dict[str, Any]]:
    backend = bytes_of(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], None)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    said = {"decoder_start_token_id": 2, "eos_token_id": 2, "forced_bos_token_id": 0, "bos_token_id": 0}
    return backend, config, said | {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True, "max_length": 62}


FAMILIES = {one.__name__: one for one in (gpt2, llama3, qwen, llama2, t5, bart)}


def write_family(name: str, folder: Path) -> Path:
    """A folder as one of `name`'s models has it."""
    backend, config, said = FAMILIES[name]()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, made once."""
    folder, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def of(name: str) -> Path:
        if name not in made:
            made[name] = write_family(name, folder / name)
        return made[name]

    return of


LINES = [
    "The quick brown fox, the lazy dog; the the the.", "Don't go! 1984 19 84", "a small house in the old town",
    "déjà vu — žluťoučký kůň", "Ein kleines Haus, größer als das andere.", "Der Hund und die Katze.",
] * 40  # fmt: skip


def sentencepieces(**options: Any) -> bytes:
    """A vocabulary of SentencePiece, trained on LINES."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer as Marian's models have it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("marian")
    pieces = ["</s>", "<unk>", ">>deu<<"]
    for side, size in (("source", 120), ("target", 90)):
        content = sentencepieces(vocab_size=size, model_type="unigram")
        (folder / f"{side}.spm").write_bytes(content)
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces += [model.id_to_piece(token) for token in range(3, model.get_piece_size())]
    pieces = list(dict.fromkeys(pieces))
    pieces = [*pieces[:3], *random.Random(0).sample(pieces[3:], len(pieces) - 9), "<pad>"]  # some are unknown
    (folder / "vocab.json").write_text(json.dumps({piece: token for token, piece in enumerate(pieces)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    pad = len(pieces) - 1
    said = {"decoder_start_token_id": pad, "eos_token_id": 0, "bad_words_ids": [[pad]], "num_beams": 6}
    (folder / "generation_config.json").write_text(json.dumps(said | {"max_length": 512, "pad_token_id": pad}))
    return folder
