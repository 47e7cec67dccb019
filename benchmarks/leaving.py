"""Whether a translator says the same elsewhere: `python -m benchmarks.leaving RUN SOURCES --out DIR`.

RUN is of `multi30k-en-de-marian` or another with `train.zero_start`. It is exported (`--to hf`, `--to ctranslate2`, and
from the first by CTranslate2's own converter), and each engine translates the same lines in fp32.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import triglot
from triglot.data.corpus import read_lines
from triglot.interop.runs import to_ctranslate2, to_transformers

LENGTH, BATCH = 100, 50


def by_transformers(folder: Path, lines: Sequence[str], beam: int) -> list[str]:
    """Translations of MarianMTModel, which ends a search when no better text can come."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[int, str] = {}
    order = sorted(range(len(lines)), key=lambda row: len(lines[row]))
    for first in range(0, len(lines), BATCH):
        rows = order[first : first + BATCH]
        inputs = tokenizer([lines[row] for row in rows], return_tensors="pt", padding=True)
        ids = model.generate(**inputs, num_beams=beam, max_new_tokens=LENGTH, length_penalty=1.0)
        found |= zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
    return [found[row] for row in range(len(lines))]


def by_ctranslate2(folder: Path, words: Path, lines: Sequence[str], beam: int) -> list[str]:
    """Translations of CTranslate2; `words` is where the tokenizer lies."""
    import ctranslate2
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(words / "tokenizer.json"))
    engine = ctranslate2.Translator(str(folder), compute_type="float32", intra_threads=torch.get_num_threads())
    rows = [tokenizer.convert_ids_to_tokens(tokenizer(line).input_ids) for line in lines]
    how: dict[str, Any] = {"beam_size": beam, "max_decoding_length": LENGTH, "max_batch_size": BATCH, "patience": 10.0}
    found = engine.translate_batch(rows, **how)
    ids = [tokenizer.convert_tokens_to_ids(one.hypotheses[0]) for one in found]
    return [tokenizer.decode(one, skip_special_tokens=True) for one in ids]


def main() -> None:
    """Export, translate, compare."""
    import ctranslate2

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    lines, ours = list(read_lines(given.sources)), triglot.load(given.run)
    hf, own, theirs = given.out / "hf", given.out / "ct2", given.out / "ct2-of-hf"
    to_transformers(given.run, hf)
    to_ctranslate2(given.run, own)
    ctranslate2.converters.TransformersConverter(str(hf)).convert(str(theirs))
    result: dict[str, dict[str, int]] = {"lines": {"all": len(lines)}}
    for beam in (1, 5):
        expected = [one[0].text for one in ours.translate(lines, beam=beam, max_new_tokens=LENGTH, length_penalty=1.0)]
        said = {
            "transformers": by_transformers(hf, lines, beam),
            "CTranslate2, own format": by_ctranslate2(own, own, lines, beam),
            "CTranslate2, from transformers": by_ctranslate2(theirs, hf, lines, beam),
        }
        for name, texts in said.items():
            same = sum(one == other for one, other in zip(texts, expected, strict=True))
            result.setdefault(name, {})[f"the same, beam {beam}"] = same
            print(f"beam {beam}, {name}: {same} of {len(lines)} the same", flush=True)
            for one, other in zip(texts, expected, strict=True):
                if one != other:
                    print(f"  here:  {other}\n  there: {one}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
