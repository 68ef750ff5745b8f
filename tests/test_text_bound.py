"""Texts that plainly have too many tokens: never one that fits, and told in no time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.errors import InvalidField
from cutaway_server.text.chat import ChatMessage
from cutaway_server.text.tokenizer import TextModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_text import ODD
from serving import asking, eventually, program, stub, tokens_of
from test_text import byte_level, llama2_like, saved
from tiny import save_tiny, save_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

HARBOUR = "The harbour lay quiet in the morning, 東京. "


def stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    return tokenizer


def without_some_bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = byte_level().decoder
    return tokenizer


def lowered() -> Tokenizer:
    return byte_level(normalizer=normalizers.Lowercase())


def without_blanks() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    return tokenizer


def without_fallback() -> Tokenizer:
    tokenizer = llama2_like()
    tokenizer.model.byte_fallback = False
    return tokenizer


BOUNDED: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "with a first space": lambda: byte_level(add_prefix_space=True),
    "composing": lambda: byte_level(normalizer=normalizers.NFC()),
    "SentencePiece": llama2_like,
    "tokens that take blanks": stripping,
    "bytes left out": without_some_bytes,
}
UNBOUNDED = {"lower case": lowered, "no blanks": without_blanks, "unknown text in one token": without_fallback}


@pytest.fixture(scope="module", params=[*BOUNDED, *UNBOUNDED])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    make = {**BOUNDED, **UNBOUNDED}[request.param]
    return TextModel.from_directory(saved(make(), tmp_path_factory.mktemp("model")))


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(ODD), st.integers(0, 10**6)), max_size=6),
    times=st.integers(1, 60),
    parsing=st.booleans(),
)
@example(parts=["<mask>", " " * 4000, "\x1c\u2003\n" * 300, "<mask>"], times=1, parsing=True)
@example(parts=["e\u0301\u1100\u1161\u11a8\u212a"], times=60, parsing=False)
@example(parts=["\x07zzz日本"], times=60, parsing=False)
def test_no_text_has_fewer_tokens_than_its_bound(
    parts: list[str | int], times: int, parsing: bool, model: TextModel
) -> None:
    """Numbers stand for tokens, longest first as often as not: texts of nothing but the longest are the tightest."""
    by_length = sorted(range(model.vocab_size), key=lambda token: -len(model.token_bytes(token)))
    text = (
        "".join(
            part if isinstance(part, str) else model.decode([by_length[part % len(by_length[:40])]]) for part in parts
        )
        * times
    )
    encoded = model.encode(text, add_special_tokens=False, parse_special_tokens=parsing)
    assert model.least_tokens(text) <= len(encoded.ids)
    assert model.prompt_ids(text, len(encoded.ids), add_special_tokens=False, parse_special_tokens=parsing) == (
        encoded.ids
    )


def test_the_bound_is_worth_something(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    model, text = TextModel.from_directory(tmp_path), "the quick brown fox " * 1000
    assert model.least_tokens(text) > len(model.encode(text).ids) / 6
    assert "prompt: 'at least" in refusal(model, text, 40)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_tokenizers_that_drop_or_join_text_promise_nothing(name: str, tmp_path: Path) -> None:
    model = TextModel.from_directory(saved(UNBOUNDED[name](), tmp_path))
    assert model.least_tokens("word " * 10_000) == 0
    assert "at least" not in refusal(model, "word " * 10_000, 40), "it is tokenised first"


def refusal(model: TextModel, text: str, most: int) -> str:
    try:
        model.prompt_ids(text, most)
    except InvalidField as error:
        return str(error)
    return ""


def test_real_models_refuse_a_long_conversation_in_a_fraction_of_the_time(smollm2_gguf: Path) -> None:
    from cutaway_server.model.open import open_model

    text = open_model(str(smollm2_gguf)).text
    turns = [ChatMessage("user", HARBOUR * 12_000)]
    text.chat_prompt_ids(
        [ChatMessage("user", HARBOUR * 400)], 8192
    )  # starts the template's process, reads the vocabulary
    took = []
    for most in (10**7, 8192):
        start = time.perf_counter()
        if most == 8192:
            with pytest.raises(InvalidField, match=r"prompt: 'at least \d+ tokens' .* the context has 8192"):
                text.chat_prompt_ids(turns, most)
        else:
            assert text.chat_prompt_ids(turns, most) == text.encode_chat(turns)[1].ids
            start = time.perf_counter()
            text.chat_prompt_ids(turns, most)
        took.append(time.perf_counter() - start)
    assert took[1] < took[0] / 2


@pytest.fixture(scope="module")
def address_and_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    with program("--model", str(path), "--kv-cache-memory", "8MiB") as (address, process):
        yield address, psutil.Process(process.pid)


def test_long_prompts_are_refused_before_they_are_tokenised(address_and_process: tuple[str, psutil.Process]) -> None:
    with stub(address_and_process[0]) as client:
        for request in (
            asking(HARBOUR * 20_000, max_tokens=1),
            v1.GenerateRequest(chat=v1.Chat(messages=[v1.Message(role="user", content=HARBOUR * 20_000)])),
        ):
            start = time.monotonic()
            with pytest.raises(Exception, match=r"prompt: 'at least \d+ tokens' .* context has 512"):
                list(client.Generate(request))
            assert time.monotonic() - start < 1.0
        assert len(tokens_of(list(client.Generate(asking("x" * 300, max_tokens=2))))) == 2


@pytest.mark.slow
def test_a_megabyte_of_text_leaves_no_memory_behind(address_and_process: tuple[str, psutil.Process]) -> None:
    address, process = address_and_process

    def resident() -> int:
        return int(process.memory_info().rss) // 2**20

    def tokenise(times: int) -> None:
        with stub(address) as client, pytest.raises(Exception, match="send it in parts"):
            client.Tokenize(v1.TokenizeRequest(text=HARBOUR * times))

    tokenise(20_000)  # what is allocated once
    before = resident()
    for _ in range(3):
        tokenise(20_000)
    assert eventually(lambda: resident() < before + 40, 5), f"{before} MiB before, {resident()} after"
