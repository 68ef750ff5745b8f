"""Tokenizers of Hugging Face directories: tokens, bytes, merges; equal to what transformers makes of the same files."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from cutaway_server.errors import InvalidField, ModelError, Unsupported
from cutaway_server.text.merges import MergeTable, retrace
from cutaway_server.text.tokenizer import TextModel
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_text import ODD, random_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ODD + random_texts(200, seed=1)
TURN = AddedToken("<|turn|>", special=True, normalized=False)
THINK = AddedToken("<think>", special=False, normalized=False)
BOS = AddedToken("<|bos|>", special=True, normalized=False)


def byte_level(*, normalizer: Any = None, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(ODD + random_texts(300, seed=2), trainer)
    tokenizer.add_tokens([BOS, TURN, THINK])
    number = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", number)]
    )
    return tokenizer


def llama2_like() -> Tokenizer:
    """SentencePiece's kind, with the normalizer and the decoder of Llama 2's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        limit_alphabet=300,
        special_tokens=["<unk>", "<|bos|>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
        show_progress=False,
    )
    words = [word for text in ODD + random_texts(300, seed=3) for word in text.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # byte pieces are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    tokenizer.add_tokens([TURN, THINK])
    return tokenizer


def saved(tokenizer: Tokenizer, path: Path, **config: object) -> Path:
    """A directory as transformers saves it."""
    path.mkdir(parents=True, exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|turn|>")
    fast.save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


MAKERS = {
    "byte-level": byte_level,
    "byte-level with NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level with a space before": lambda: byte_level(add_prefix_space=True),
    "llama-2": llama2_like,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(MAKERS[request.param](), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(directory: Path) -> TextModel:
    return TextModel.from_directory(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.from_directory(saved(byte_level(), tmp_path_factory.mktemp("byte_level")))


def test_tokens_equal_those_of_transformers(ours: TextModel, theirs: Any) -> None:
    for text in [*TEXTS, "<|bos|>a<|turn|> b <think>c", "<|turn|><|turn|>", "<think> <think>"]:
        for adding in (True, False):
            parsed = ours.encode(text, add_special_tokens=adding, parse_special_tokens=True)
            assert list(parsed.ids) == theirs.encode(text, add_special_tokens=adding), text
            assert list(parsed.pieces) == theirs.convert_ids_to_tokens(parsed.ids)
            literal = theirs(text, add_special_tokens=adding, split_special_tokens=True).input_ids
            assert list(ours.encode(text, add_special_tokens=adding).ids) == literal, text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), parsing=st.booleans())
def test_any_text_makes_the_tokens_of_transformers(text: str, parsing: bool, ours: TextModel, theirs: Any) -> None:
    expected = theirs(text, split_special_tokens=not parsing).input_ids
    assert list(ours.encode(text, parse_special_tokens=parsing).ids) == expected


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skipping=st.booleans())
def test_any_token_ids_decode_as_in_transformers(
    data: st.DataObject, skipping: bool, ours: TextModel, theirs: Any
) -> None:
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    expected = theirs.decode(ids, skip_special_tokens=skipping, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, skip_special_tokens=skipping) == expected


def test_what_the_model_knows_of_its_special_tokens(ours: TextModel, theirs: Any) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_token_ids == {n for n, token in theirs.added_tokens_decoder.items() if token.special}
    assert theirs.convert_tokens_to_ids("<think>") not in ours.special_token_ids


def test_special_tokens_in_text_are_text_and_added_ones_are_not(ours: TextModel) -> None:
    encoded = ours.encode("<|bos|><|turn|> a <|turn|>")
    assert encoded.ids[0] == ours.bos_token_id
    assert not ours.special_token_ids & set(encoded.ids[1:])
    assert ours.decode(encoded.ids[1:]).strip() == "<|bos|><|turn|> a <|turn|>"


def test_byte_spans_cover_the_text_and_hold_what_their_tokens_say(byte_model: TextModel) -> None:
    for text in [*TEXTS, "<|turn|> x <|turn|>"]:
        for parsing in (False, True):
            raw, encoded = text.encode(), byte_model.encode(text, parse_special_tokens=parsing)
            spans = list(zip(encoded.byte_starts, encoded.byte_ends, strict=True))
            assert spans[0] == (0, 0)  # BOS is added
            assert all(left[1] == right[0] for left, right in pairwise(spans))
            assert spans[-1][1] == len(raw)
            for token, (start, end) in list(zip(encoded.ids, spans, strict=True))[1:]:
                assert byte_model.token_bytes(token) == raw[start:end]


def test_byte_spans_of_any_tokenizer_lie_in_order_and_reach_the_end(ours: TextModel) -> None:
    for text in TEXTS:
        encoded = ours.encode(text)
        assert all(start <= end for start, end in zip(encoded.byte_starts, encoded.byte_ends, strict=True))
        assert list(encoded.byte_starts) == sorted(encoded.byte_starts)
        assert max(encoded.byte_ends, default=0) == len(text.encode())


def test_the_space_that_sentencepiece_adds_is_not_counted(tmp_path: Path) -> None:
    model = TextModel.from_directory(saved(llama2_like(), tmp_path))
    text = "hello 👾!"
    encoded = model.encode(text, add_special_tokens=False)
    joined = b"".join(text.encode()[a:b] for a, b in zip(encoded.byte_starts, encoded.byte_ends, strict=True))
    assert joined == text.encode()
    assert b"".join(map(model.token_bytes, encoded.ids)) == b" " + text.encode()
    assert "<0x91>" in encoded.pieces


def test_a_space_of_sentencepieces_own_spelling_is_covered_whole(tmp_path: Path) -> None:
    model = TextModel.from_directory(saved(llama2_like(), tmp_path))
    text = "a▁7 ▁▁é"
    encoded = model.encode(text, add_special_tokens=False)
    joined = b"".join(text.encode()[a:b] for a, b in zip(encoded.byte_starts, encoded.byte_ends, strict=True))
    assert joined == text.encode()


def test_normalised_characters_are_covered_whole(tmp_path: Path) -> None:
    model = TextModel.from_directory(saved(byte_level(normalizer=normalizers.NFC()), tmp_path))
    for text, end in (("7e\u03017", 4), ("7e\u0301", 4), ("7\u1112\u1161\u11ab7", 10)):
        encoded = model.encode(text, add_special_tokens=False)
        spans = list(zip(encoded.byte_starts, encoded.byte_ends, strict=True))
        assert spans[0] == (0, 1)
        assert set(spans[1:]) - {(end, end + 1)} == {(1, end)}


def test_token_bytes_are_exact_where_text_is_not(byte_model: TextModel) -> None:
    ids = byte_model.encode("\U0001f47e", add_special_tokens=False).ids
    assert b"".join(map(byte_model.token_bytes, ids)) == "\U0001f47e".encode()
    assert len(ids) > 1
    assert byte_model.decode(ids[:1]) == "\ufffd"
    assert byte_model.token_bytes(byte_model.eos_token_id or 0) == b"<|turn|>"


def test_ids_beyond_the_vocabulary_stand_for_nothing_and_negative_ones_are_refused(byte_model: TextModel) -> None:
    ids = [*byte_model.encode("ab", add_special_tokens=False).ids, byte_model.vocab_size, 2**40]
    assert byte_model.decode(ids) == "ab"
    assert byte_model.token_bytes(2**40) == b""
    for refused in (lambda: byte_model.decode([-1]), lambda: byte_model.token_bytes(-1)):
        with pytest.raises(InvalidField, match="-1"):
            refused()


def test_a_lone_surrogate_is_refused(byte_model: TextModel) -> None:
    with pytest.raises(InvalidField, match=r"text: .* character 2 is a lone surrogate"):
        byte_model.encode("ab\ud800")


def test_threads_do_not_disturb_each_other(byte_model: TextModel) -> None:
    text = "a <|turn|> and <think> b" * 20
    expected = {parsing: byte_model.encode(text, parse_special_tokens=parsing) for parsing in (False, True)}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda n: byte_model.encode(text, parse_special_tokens=n % 2 == 0) == expected[n % 2 == 0], range(400)
        )
    assert all(found)


def test_merges_lead_to_the_encoders_tokens(ours: TextModel) -> None:
    for text in [*TEXTS, "<think>x<think>"]:
        words = ours.merges(text)
        assert (
            tuple(piece for word in words for piece in word.pieces)
            == ours.encode(text, add_special_tokens=False).pieces
        )


def test_merges_say_rank_and_place(tmp_path: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merged in ("an", "ban", "ana", "Ġb"):
        vocabulary[merged] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "n"), ("b", "an"), ("an", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    first, second = TextModel.from_directory(tmp_path).merges("banana ba")
    assert first.symbols == tuple("banana")
    told = [(step.left, step.right, step.rank, step.position) for step in first.steps]
    assert told == [("a", "n", 0, 1), ("a", "n", 0, 2), ("b", "an", 1, 0), ("an", "a", 2, 1)]
    assert second.pieces == ("Ġb", "a")


@given(st.lists(st.sampled_from("ab"), max_size=30), st.permutations(["aa", "ab", "ba", "bb", "aaa", "aab", "abab"]))
def test_retraced_merges_are_those_of_a_naive_search(symbols: list[str], tokens: list[str]) -> None:
    pairs = [(t[:cut], t[cut:]) for t in tokens for cut in range(1, len(t))]
    known = {"a", "b", *tokens}
    pairs = [(left, right) for left, right in pairs if left in known and right in known]
    numbers = {token: number for number, token in enumerate(sorted(known))}
    pieces, steps = list(symbols), []
    while found := [(pairs.index(pair), place) for place, pair in enumerate(pairwise(pieces)) if pair in pairs]:
        rank, place = min(found)
        steps.append((rank, place))
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    word = retrace(symbols, numbers.get, MergeTable(numbers, pairs))
    assert [(step.rank, step.position) for step in word.steps] == steps
    assert word.pieces == tuple(pieces)


def test_a_tokenizer_without_merges_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Unsupported, match="not byte-pair encoding"):
        TextModel.from_directory(tmp_path).merges("a")


def test_merges_of_very_long_texts_are_refused(byte_model: TextModel) -> None:
    with pytest.raises(InvalidField, match="100001 symbols"):
        byte_model.merges("x" * 100_001)


def test_words_that_merges_do_not_lead_to_have_no_steps(tmp_path: Path) -> None:
    tokenizer = byte_level()
    described = json.loads(tokenizer.to_str())
    described["model"] |= {"ignore_merges": True}
    described["model"]["vocab"]["zqzqz"] = 700
    described["added_tokens"] = []
    described["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (word,) = TextModel.from_directory(tmp_path).merges("zqzqz")
    assert (word.symbols, word.steps) == (("zqzqz",), ())


def test_plain_text_that_only_a_special_token_can_spell_is_refused(tmp_path: Path) -> None:
    described = json.loads(byte_level().to_str())
    described["model"] |= {"ignore_merges": True}
    described["model"]["vocab"]["zqzqz"] = 700
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described["added_tokens"] = [{"id": 700, "content": "zqzqz", **entry}]
    described["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    model = TextModel.from_directory(tmp_path)
    assert model.encode("zqzqz", parse_special_tokens=True).ids == (700,)
    with pytest.raises(InvalidField, match="zqzqz"):
        model.encode("zqzqz")


def test_a_directory_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json; make one with transformers"):
        TextModel.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "one JSON object"),
        ('{"model": {"type": "Brand"}}', "tokenizer.json"),
        ("\x00", "tokenizer.json"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        TextModel.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bos_token": "<nowhere>"}, "bos_token: '<nowhere>' is not in the vocabulary"),
        ({"eos_token": 7}, "eos_token: 7 should be a token's text"),
        ({"added_tokens_decoder": {"x": {}}}, r"added_tokens_decoder\['x'\]"),
        ({"added_tokens_decoder": {"9": {"content": "<|turn|>"}}}, r"'<\|turn\|>' has another id"),
        ({"chat_template": 7}, "chat_template: should be text"),
    ],
)
def test_a_damaged_tokenizer_config_is_refused(config: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        TextModel.from_directory(saved(byte_level(), tmp_path, **config))


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="neither byte-level nor SentencePiece"):
        TextModel.from_directory(saved(tokenizer, tmp_path))


@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_tokenizer_json_decides_what_is_added(flags: tuple[bool, bool], tmp_path: Path) -> None:
    first, last = flags
    path = saved(byte_level(), tmp_path, add_bos_token=first, add_eos_token=last)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ids = TextModel.from_directory(path).encode("hello").ids
    assert list(ids) == theirs("hello").input_ids
    assert (ids[0], ids[-1] in theirs.all_special_ids) == (theirs.bos_token_id, False)


def test_tokens_that_only_tokenizer_config_lists_are_added(tmp_path: Path) -> None:
    entry = {"content": "<|late|>", "lstrip": False, "rstrip": False, "single_word": False, "special": True}
    path = saved(byte_level(), tmp_path)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    number = TextModel.from_directory(path).vocab_size
    file.write_text(json.dumps(config | {"added_tokens_decoder": {str(number): entry}}))
    model = TextModel.from_directory(path)
    assert model.vocab_size == number + 1
    assert number in model.special_token_ids
    assert model.encode("<|late|>", add_special_tokens=False, parse_special_tokens=True).ids == (number,)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
        ([{"name": "a", "template": "1"}, {"name": "b", "template": "2"}], ""),
        (None, ""),
    ],
)
def test_the_chat_template_is_found(template: object, expected: str, tmp_path: Path) -> None:
    path = saved(byte_level(), tmp_path, chat_template=template)
    assert TextModel.from_directory(path).chat_template == expected
    (path / "chat_template.jinja").write_text("from its own file")
    assert TextModel.from_directory(path).chat_template == "from its own file"
