"""Text as tokens come: nothing halved, nothing lost, nothing of a stop text shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
from cutaway_server.model.gguf_file import GgufReader
from cutaway_server.text.stream import CompletionText, Shown, StreamDecoder, stop_texts
from cutaway_server.text.tokenizer import TextModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_text import ODD, random_texts
from test_text import MAKERS, saved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@pytest.fixture(scope="module", params=["byte-level", "llama-2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.from_directory(saved(MAKERS[request.param](), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """A tokenizer in which "a" to "h" and their pairs and triples are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ab", "bc", "abc", "bcab", "cc", "dd", "abcd", "xyz"]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("letters")
    tokenizer.save(str(path / "tokenizer.json"))
    return TextModel.from_directory(path)


def number(model: TextModel, piece: str) -> int:
    return next(token for token in range(model.vocab_size) if model.piece(token) == piece)


def streamed(model: TextModel, ids: Sequence[int], *, skipping: bool = True) -> list[str]:
    decoder = StreamDecoder(model, skip_special_tokens=skipping)
    return [*map(decoder.push, ids), decoder.finish()]


def completion_of(model: TextModel, stops: Sequence[str], min_tokens: int = 0) -> CompletionText:
    return CompletionText(StreamDecoder(model), stop_texts(stops), min_tokens)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), skipping=st.booleans())
def test_a_stream_of_any_tokens_joins_to_what_they_decode_to(
    data: st.DataObject, skipping: bool, model: TextModel
) -> None:
    ids = data.draw(st.lists(st.integers(0, model.vocab_size + 1) | st.integers(0, 260), max_size=40))
    assert "".join(streamed(model, ids, skipping=skipping)) == model.decode(ids, skip_special_tokens=skipping)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), skipping=st.booleans())
def test_a_completion_goes_on_where_its_prompt_ends(data: st.DataObject, skipping: bool, model: TextModel) -> None:
    some_ids = st.lists(st.integers(0, model.vocab_size + 1) | st.integers(0, 260), max_size=12)
    prompt, completions = data.draw(some_ids), data.draw(st.lists(some_ids, max_size=3))
    read = StreamDecoder(model, skipping)
    echo = "".join(map(read.push, prompt))
    for ids in completions:
        fork = read.fork()
        text = "".join([*map(fork.push, ids), fork.finish()])
        assert echo + text == model.decode([*prompt, *ids], skip_special_tokens=skipping)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), skipping=st.booleans())
def test_a_completion_without_its_prompt_is_what_decoding_adds_to_the_prompts_text(
    data: st.DataObject, skipping: bool, model: TextModel
) -> None:
    some_ids = st.lists(st.integers(0, model.vocab_size + 1) | st.integers(0, 260), max_size=12)
    the = model.encode("the", add_special_tokens=False).ids
    prompt, ids = [*the, *data.draw(some_ids)], data.draw(some_ids)
    before = model.decode(prompt, skip_special_tokens=skipping)
    whole = model.decode([*prompt, *ids], skip_special_tokens=skipping)
    if whole.startswith(before):  # else a byte of the prompt reads differently now: see below
        assert alone(model, prompt, ids, skipping=skipping) == whole[len(before) :]


def alone(model: TextModel, prompt: Sequence[int], ids: Sequence[int], *, skipping: bool = True) -> str:
    decoder = StreamDecoder(model, skipping)
    decoder.skim(prompt)
    decoder.disown()
    return "".join([*map(decoder.push, ids), decoder.finish()])


def test_only_the_prompts_first_space_is_dropped(model: TextModel) -> None:
    prompt, more = (model.encode(text, add_special_tokens=False).ids for text in ("the", " fox"))
    if model.spelling.kind == "sentencepiece":
        more = model.encode("fox", add_special_tokens=False).ids  # its first piece begins with the space
    assert alone(model, prompt, more) == " fox"
    assert alone(model, [], more) == model.decode(more)


def test_a_character_that_the_completion_completes_is_the_completions(model: TextModel) -> None:
    e, acute = (byte_token(model, byte) for byte in "é".encode())
    x = byte_token(model, ord("x"))
    assert alone(model, [x, e], [acute, x]) == "éx"
    assert alone(model, [x, e], []) == ""


def byte_token(model: TextModel, byte: int) -> int:
    single = [token for token in range(model.vocab_size) if model.token_bytes(token) == bytes([byte])]
    return next((token for token in single if model.spelling.byte(model.piece(token) or "") == byte), single[0])


def test_of_a_prompt_that_is_not_sent_only_the_end_is_read(model: TextModel) -> None:
    ids = model.encode("the quick brown fox 👾 " * 200, add_special_tokens=False).ids * 10
    read = []
    piece = model.piece
    counting = SimpleNamespace(spelling=model.spelling, special_token_ids=model.special_token_ids)
    counting.piece = lambda token: (read.append(token), piece(token))[1]
    StreamDecoder(counting).skim(ids)
    assert len(read) < 20


def test_a_stream_shows_no_half_character(model: TextModel) -> None:
    for text in ODD + random_texts(100, seed=4):
        ids = model.encode(text, add_special_tokens=False).ids
        parts = streamed(model, ids)
        assert "".join(parts) == text.replace("▁", " " if model.spelling.kind == "sentencepiece" else "▁")
        assert len("".join(parts)) == len(text)


def test_a_character_is_shown_with_its_last_byte(letters: TextModel) -> None:
    ids = letters.encode("a\u00e9\U0001f47eb", add_special_tokens=False).ids
    assert streamed(letters, ids) == ["a", "", "é", "", "", "", "👾", "b", ""]


def test_broken_bytes_are_shown_as_soon_as_they_are_known_to_be_broken(letters: TextModel) -> None:
    lead, tail = (letters.encode("é", add_special_tokens=False).ids[place] for place in (0, 1))
    a = letters.encode("a", add_special_tokens=False).ids[0]
    assert streamed(letters, [tail, a]) == ["\ufffd", "a", ""]
    assert streamed(letters, [lead, a]) == ["", "\ufffda", ""]
    assert streamed(letters, [lead, lead]) == ["", "\ufffd", "\ufffd"]


def test_special_tokens_are_shown_only_if_asked_for(model: TextModel) -> None:
    special = model.eos_token_id
    assert special is not None
    ids = [special, *model.encode("hi", add_special_tokens=False).ids, special]
    assert "".join(streamed(model, ids)).strip() == "hi"
    assert "".join(streamed(model, ids, skipping=False)).replace(" ", "") == "<|turn|>hi<|turn|>"


def test_a_token_costs_the_same_however_long_the_text_is(model: TextModel) -> None:
    ids = model.encode("the quick brown fox 👾 " * 200, add_special_tokens=False).ids * 10

    def seconds(count: int) -> float:
        completion = completion_of(model, ("zzz", "foxes"))
        start = perf_counter()
        for token in ids[:count]:
            completion.push(token)
        return perf_counter() - start

    quarter = len(ids) // 4
    assert min(seconds(len(ids)) for _ in range(3)) < 12 * min(seconds(quarter) for _ in range(3))


def shown(model: TextModel, tokens: str, stops: Sequence[str], min_tokens: int = 0) -> list[str | tuple[str, str]]:
    """What is shown with each of the tokens that `tokens` names; with its stop text for the one that ends it."""
    completion = completion_of(model, stops, min_tokens)
    result: list[str | tuple[str, str]] = []
    for piece in tokens.split():
        told = completion.push(number(model, piece))
        result.append(told.text if told.stop is None else (told.text, told.stop))
        if told.stop is not None:
            assert completion.push(0) == Shown("", told.stop)
            assert completion.finish() == ""
            return result
    return [*result, completion.finish()]


def test_text_is_held_back_while_it_could_be_a_stop_text(letters: TextModel) -> None:
    assert shown(letters, "x a b d", ["abc"]) == ["x", "", "", "abd", ""]
    assert shown(letters, "x a b", ["abc"]) == ["x", "", "", "ab"]
    assert shown(letters, "a a b c", ["abc"]) == ["", "a", "", ("", "abc")]


def test_a_stop_text_and_what_follows_it_are_not_shown(letters: TextModel) -> None:
    assert shown(letters, "x abcd x", ["bc"]) == ["x", ("a", "bc")]
    assert shown(letters, "x ab c d", ["bc"]) == ["x", "a", ("", "bc")]
    assert shown(letters, "xyz", ["xyz"]) == [("", "xyz")]


def test_the_stop_text_that_is_complete_first_counts_and_of_two_the_longer(letters: TextModel) -> None:
    assert shown(letters, "abcd", ["abcd", "bc"]) == [("a", "bc")]
    assert shown(letters, "abcd", ["bc", "c", "abc"]) == [("", "abc")]
    assert shown(letters, "abcd", ["b", "abc"]) == [("a", "b")]


def test_a_stop_text_that_overlaps_itself_is_found(letters: TextModel) -> None:
    assert shown(letters, "x c c d cc d d", ["ccdccdd"]) == ["x", "", "", "", "", "", ("", "ccdccdd")]
    assert shown(letters, "c c d cc d cc d d", ["ccdccdd"]) == ["", "", "", "", "", "ccd", "", ("", "ccdccdd")]


def test_stop_texts_within_the_first_tokens_do_not_count(letters: TextModel) -> None:
    assert shown(letters, "a b a b", ["ab"]) == ["", ("", "ab")]
    assert shown(letters, "a b a b", ["ab"], min_tokens=2) == ["", "ab", "", ("", "ab")]
    assert shown(letters, "a b a b", ["ab"], min_tokens=1) == ["", ("", "ab")]
    assert shown(letters, "a b a b", ["ab"], min_tokens=4) == ["", "ab", "", "ab", ""]


def test_a_stop_text_in_what_was_left_is_cut_off_and_told(letters: TextModel) -> None:
    lead = letters.encode("é", add_special_tokens=False).ids[0]
    completion = completion_of(letters, ("\ufffd",))
    assert completion.push(lead) == Shown("")
    assert (completion.finish(), completion.stop) == ("", "\ufffd")


@settings(max_examples=400, deadline=None)
@example(pieces=["a", "a", "b"], stops=["aab", "ab"], min_tokens=0)
@given(
    pieces=st.lists(st.sampled_from(["a", "b", "c", "ab", "bc", "abc", "bcab", "cc", "dd", "abcd"]), max_size=25),
    stops=st.lists(st.text("abcd", min_size=1, max_size=5), max_size=4),
    min_tokens=st.integers(0, 6),
)
def test_completions_end_where_a_naive_search_says(
    pieces: list[str], stops: list[str], min_tokens: int, letters: TextModel
) -> None:
    completion = completion_of(letters, stops, min_tokens)
    told = [completion.push(number(letters, piece)) for piece in pieces]
    text = "".join(part.text for part in told) + completion.finish()
    whole = "".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    free = ends[min_tokens - 1] if 0 < min_tokens <= len(ends) else len(whole) if min_tokens else 0
    found = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(max(free + 1, len(stop)), len(whole) + 1)
        if whole[end - len(stop) : end] == stop
    ]
    if not found:
        assert (text, completion.stop) == (whole, None)
        return
    end, _, stop = min(found)
    assert (text, completion.stop) == (whole[: end - len(stop)], stop)
    place = next(place for place, reached in enumerate(ends) if reached >= end)
    assert [part.stop for part in told] == [None] * place + [stop] * (len(pieces) - place)


def test_smollm2_streams_what_it_decodes(smollm2_gguf: Path) -> None:
    model = TextModel.from_gguf(GgufReader(smollm2_gguf).metadata)
    for text in ODD + random_texts(100, seed=8):
        ids = model.encode(text).ids
        assert "".join(streamed(model, ids)) == text
        assert "".join(streamed(model, ids[::-1])) == model.decode(ids[::-1])
