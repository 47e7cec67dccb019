"""Whatever a model would like, what it writes under a rule follows the rule, and all that follows it can be written."""

import json
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.decoding.beam import BeamSearch, beam_search
from triglot.decoding.rules import Rule
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Decoded, generate
from triglot.errors import ConfigError
from triglot.generation.structured import (
    Structured,
    from_grammar,
    from_json_schema,
    from_regex,
    json_schema_grammar,
    regex_grammar,
)
from triglot.tokenizer import SpecialIds, Tokenizer

pytest.importorskip("llguidance")

EOS, ROWS, LIMIT = SpecialIds().eos, 5, 150
CORPUS = ['{"name": "Anna", "age": 31, "tags": ["x", true]} nein ja vielleicht 2024-11 abcd 🙂🙂 grün null <eos> ' * 3]
TOKENIZERS = {
    "byte": Tokenizer.train("byte", []),
    "char": Tokenizer.train("char", CORPUS),
    "bpe": Tokenizer.train("bpe", CORPUS, 331, tags=("de",)),
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", True, None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "enum": {"enum": ["rot", "grün", 3, None]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "one of two": {"anyOf": [{"type": "null"}, {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}]},
}
VALID: dict[str, list[Any]] = {
    "object": [{"name": "Anna", "age": 31}, {"name": "", "age": 0, "tags": ["x", None]}, {"name": "🙂ü", "age": 120}],
    "enum": ["rot", "grün", 3, None],
    "array": [[True], [False, True, True, False]],
    "one of two": [None, [{"name": "a", "age": 7}]],
}
REGEXES: dict[str, list[str]] = {
    r"[0-9]{4}-[01][0-9]": ["2024-11", "0000-09"],
    r"ja|nein|vielleicht": ["ja", "nein", "vielleicht"],
    r"[a-c]*d?🙂{1,2}": ["🙂", "abcd🙂🙂", "cc🙂"],
    r"(ab|cd){2,3}": ["abcd", "cdcdab"],
    r"(<eos>|a)?": ["", "a", "<eos>"],
}


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """The keywords of the schemas above, as the standard words them."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "array":
            fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(valid(item, schema["items"]) for item in value)
        case _:
            known = schema["properties"]
            fits = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(known)
            return fits and all(valid(item, known[key]) for key, item in value.items())


class Whim:
    """A model that likes something else at every step."""

    def __init__(self, tokenizer: Tokenizer, seed: int, wide: int = 0) -> None:
        self.random, self.vocab = torch.Generator().manual_seed(seed), tokenizer.vocab_size + wide

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return 3 * torch.randn(len(tokens), self.vocab, generator=self.random)

    def select(self, rows: torch.Tensor) -> None: ...


def write(rule: Rule, tokenizer: Tokenizer, seed: int, temperature: float, limit: int = LIMIT) -> list[Decoded]:
    whim = Whim(tokenizer, seed, wide=307)
    first = whim.step(torch.zeros(ROWS))
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(temperature=temperature)
    return generate(first, whim, sampler, limit, eos_ids=[EOS], rules=[rule], generator=generator)


kinds = pytest.mark.parametrize("kind", TOKENIZERS)
temperatures = pytest.mark.parametrize("temperature", [0.0, 1.3])


@kinds
@temperatures
@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_is_written_under_a_schema_is_valid(schema, kind, temperature):
    tokenizer, form = TOKENIZERS[kind], SCHEMAS[schema]
    for seed in range(5):
        for text in write(from_json_schema(form, tokenizer, ROWS), tokenizer, seed, temperature):
            assert not text.truncated
            assert valid(json.loads(tokenizer.decode(text.ids)), form)


@kinds
def test_no_white_space_stands_between_the_parts_of_json(kind):
    rule = from_json_schema({"type": "array", "items": PERSON, "minItems": 2}, TOKENIZERS[kind], 1)
    spaces = {token for token in range(TOKENIZERS[kind].vocab_size) if TOKENIZERS[kind].token_bytes(token).isspace()}
    for begun in ("", "[", '[{"name":"a b"', '[{"name":"a b",', '[{"name":"a b","age":', '[{"name":"","age":1}'):
        assert spaces
        assert not allowed(rule, TOKENIZERS[kind], TOKENIZERS[kind].encode(begun)) & spaces


@kinds
@temperatures
@pytest.mark.parametrize("regex", REGEXES)
def test_what_is_written_under_a_regex_matches_it(regex, kind, temperature):
    tokenizer = TOKENIZERS[kind]
    for seed in range(5):
        for text in write(from_regex(regex, tokenizer, ROWS), tokenizer, seed, temperature):
            assert not text.truncated
            assert re.fullmatch(regex, tokenizer.decode(text.ids))


@kinds
def test_beams_follow_the_rule_of_their_sentence(kind):
    tokenizer, regexes = TOKENIZERS[kind], [r"(ab|cd){2,3}", r"[0-9]{4}-[01][0-9]", r"[a-c]*d?🙂{1,2}"]
    rule = Structured(tokenizer, [regex_grammar(regex) for regex in regexes])
    for seed in range(5):
        whim = Whim(tokenizer, seed)
        first = whim.step(torch.zeros(3))
        found = beam_search(first, whim, BeamSearch(beam=4, nbest=3, eos_ids=[EOS], rules=[rule]), 40)
        for texts, regex in zip(found, regexes, strict=True):
            assert texts
            assert all(re.fullmatch(regex, tokenizer.decode(text.ids)) for text in texts if not text.truncated)


def allowed(rule: Rule, tokenizer: Tokenizer, text: list[int]) -> set[int]:
    """The ids that may follow `text`."""
    logits = rule(torch.zeros(1, tokenizer.vocab_size), [text], [0])[0]
    return set(logits.isfinite().nonzero()[:, 0].tolist())


@kinds
@pytest.mark.parametrize("regex", REGEXES)
def test_all_that_matches_can_be_written_and_may_end_where_it_matches(regex, kind):
    tokenizer, rule = TOKENIZERS[kind], from_regex(regex, TOKENIZERS[kind], 1)
    for text in REGEXES[regex]:
        ids = tokenizer.encode(text)
        for number in range(len(ids) + 1):
            possible = allowed(rule, tokenizer, ids[:number])
            assert set(ids[number : number + 1]) <= possible
            spelled = b"".join(map(tokenizer.token_bytes, ids[:number])).decode("utf-8", "surrogateescape")
            assert (EOS in possible) == bool(re.fullmatch(regex, spelled))
            assert all(tokenizer.token_bytes(token) for token in possible - {EOS})


@kinds
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_valid_value_can_be_written(schema, kind):
    tokenizer = TOKENIZERS[kind]
    for asked, separators in (({}, (",", ":")), ({"x-guidance": {"whitespace_flexible": True}}, (", ", ": "))):
        rule = from_json_schema(json.dumps(SCHEMAS[schema] | asked), tokenizer, 1)
        for value in VALID[schema]:
            ids = tokenizer.encode(json.dumps(value, ensure_ascii=False, separators=separators), eos=True)
            for number, token in enumerate(ids):
                assert token in allowed(rule, tokenizer, ids[:number])


@kinds
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_what_may_follow_depends_on_a_rows_text_alone(kind, data):
    tokenizer = TOKENIZERS[kind]
    regex, schema = r"[a-c]*d?🙂{1,2}", SCHEMAS["object"]
    grammars = [regex_grammar(regex), json_schema_grammar(schema), None]
    whole = [tokenizer.encode(text) for text in ("abcd🙂🙂", '{"name":"🙂ü","age":120}', "anything")]
    others = [tokenizer.encode(text) for text in ("cc🙂", '{"name":"A nna","age":31}', "")]
    rule = Structured(tokenizer, grammars)
    for _ in range(4):
        requests = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=7))
        texts = [data.draw(st.sampled_from([whole, others]))[request] for request in requests]
        texts = [text[: data.draw(st.integers(0, len(text)))] for text in texts]
        logits = torch.randn(len(texts), tokenizer.vocab_size)
        together = rule(logits, texts, requests)
        for row, (text, request) in enumerate(zip(texts, requests, strict=True)):
            fresh = Structured(tokenizer, grammars)
            assert torch.equal(together[row : row + 1], fresh(logits[row : row + 1], [text], [request]))
            assert grammars[request] is not None or torch.equal(together[row], logits[row])


@kinds
def test_a_text_that_is_cut_off_is_the_beginning_of_one_that_follows(kind):
    tokenizer, form = TOKENIZERS[kind], SCHEMAS["one of two"]
    for seed in range(5):
        rule = from_json_schema(form, tokenizer, ROWS)
        begun = [text.ids for text in write(rule, tokenizer, seed, 1.0, limit=7) if text.truncated]

        def go_on(logits, texts, requests, rule=rule, begun=begun):
            return rule(
                logits, [[*begun[request], *text] for text, request in zip(texts, requests, strict=True)], requests
            )

        whim = Whim(tokenizer, seed)
        for text, end in zip(
            begun, generate(whim.step(begun), whim, Sampler(), LIMIT, eos_ids=[EOS], rules=[go_on]), strict=True
        ):
            assert valid(json.loads(tokenizer.decode([*text, *end.ids])), form)


def test_a_grammar_may_be_laid_down_in_lark():
    tokenizer = TOKENIZERS["bpe"]
    rule = from_grammar('start: "(" start ")" | /[a-c]/', tokenizer, ROWS)
    for text in write(rule, tokenizer, 1, 1.0):
        left, middle, right = re.fullmatch(r"(\(*)(.*?)(\)*)", tokenizer.decode(text.ids)).groups()
        assert middle in "abc"
        assert text.truncated or len(left) == len(right)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: from_json_schema("{", t, 1), r"`json_schema` must be JSON, but is not: "),
        (lambda t: from_json_schema({"enum": [{1, 2}]}, t, 1), r"`json_schema` must be JSON, but is not: "),
        (lambda t: from_json_schema("3", t, 1), r"`json_schema` must be a JSON object, but is 3 instead\."),
        (lambda t: from_json_schema({"type": "foo"}, t, 1), r"`json_schema` must be .* against it: Invalid type: foo"),
        (lambda t: from_json_schema({"not": {}}, t, 1), r"`json_schema` must be .*Unimplemented keys: \[\"not\"\]"),
        (lambda t: from_regex("[ab", t, 1), r"`regex` must be one that llguidance can .* unclosed char"),
        (lambda t: from_regex("a(?=b)", t, 1), r"`regex` must be .*look-around.* is not supported"),
        (lambda t: from_regex(r"[^\s\S]", t, 1), r"`grammar` must be one that llguidance can follow, but"),
        (lambda t: from_json_schema({"type": "integer", "minimum": 5, "maximum": 3}, t, 1), "`json_schema` .* Unsatis"),
        (lambda t: from_grammar("start: other", t, 1), r"`grammar` must be .* unknown name: \"other\""),
    ],
)  # fmt: skip
def test_what_can_not_be_followed_is_refused_before_work_starts(make, message):
    with pytest.raises(ConfigError, match=message):
        make(TOKENIZERS["bpe"])


def test_a_text_that_left_the_grammar_is_refused_and_harms_no_other():
    tokenizer = TOKENIZERS["byte"]
    rule, logits = from_regex("ab", tokenizer, 2), torch.zeros(1, tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=r"`the grammar of request 1` must be .* doesn't satisfy the grammar"):
        rule(logits, [tokenizer.encode("b")], [1])
    assert allowed(rule, tokenizer, tokenizer.encode("a")) == set(tokenizer.encode("b"))
    assert rule(logits, [tokenizer.encode("a")], [1]).isfinite().sum() == 1


def test_a_rule_is_for_its_tokenizer_and_its_requests():
    tokenizer = TOKENIZERS["byte"]
    rule = from_regex("ab", tokenizer, 1)
    with pytest.raises(ConfigError, match=r"`the number of logits` must be at least that of the tokenizer \(259\)"):
        rule(torch.zeros(1, 258), [[]], [0])
    with pytest.raises(ConfigError, match=r"`grammars` must be one for each of at least 2 requests, but is 1 instead"):
        rule(torch.zeros(1, 259), [[]], [1])
    assert isinstance(rule, Rule)


def test_without_the_library_it_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"`llguidance` must be there .*pip install 'triglot\[structured\]'"):
        from_regex("a", TOKENIZERS["byte"], 1)
