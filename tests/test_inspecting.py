"""What a researcher's hands meet: names, several prompts, texts of tokens, arithmetic, pictures and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
from cutaway import Array, Arrays, AsyncClient, Capture, Client, Edit, InvalidArgument, NotFound
from cutaway.notebook import scale_of
from serving import LiveServer, serving

TEXT = "The capital of France"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_tiny("llama", path)
    with serving(path) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[Client]:
    with Client(live.address) as client:
        yield client


def grid(**fields: object) -> Array:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    at = {"head": (5, 7), "q_pos": (4, 5, 6), "k_pos": range(4)}
    return Array(values, ("head", "q_pos", "k_pos"), "blocks.1.attn.hook_pattern", at, **fields)  # type: ignore[arg-type]


def test_arithmetic_keeps_names_where_the_operands_agree() -> None:
    one, other = grid(), grid()
    for result in (other * 2 - one, np.sqrt(one * one), -one + 2 * one):
        assert isinstance(result, Array)
        assert (result.axes, result.at, result.name) == (one.axes, one.at, one.name)
        assert np.array_equal(result.values, one.values)
    shifted = Array(one.values, one.axes, one.name, {**one.at, "head": (0, 1)})
    assert type(one - shifted) is np.ndarray, "other heads: the places would be wrong"
    assert type(one @ np.ones(4, np.float32)) is np.ndarray
    assert (one >= other).values.all()
    assert one.ndim == 3


def test_reductions_take_names_of_axes_and_keep_the_others() -> None:
    one = grid()
    for mean in (one.mean("q_pos"), one.mean(1), np.mean(one, axis=-2)):
        assert (mean.axes, mean.at) == (("head", "k_pos"), {"head": (5, 7), "k_pos": range(4)})
        assert np.array_equal(mean.values, one.values.mean(1))
    assert one.max(("head", "q_pos")).values.tolist() == one.values.max((0, 1)).tolist()
    assert (one.sum(), one.min(), np.max(one)) == (276, 0, 23)
    assert one.sum(0, keepdims=True).shape == (1, 3, 4)
    with pytest.raises(KeyError, match="no axis 'layer'; it has head, q_pos, k_pos"):
        one.sum("layer")


def test_what_was_not_captured_is_told_with_what_was() -> None:
    with pytest.raises(KeyError, match=r"head 6 of .* was not captured; there are 5, 7"):
        grid().sel(head=6)


def test_a_picture_has_each_place_once_and_the_tokens_beside() -> None:
    html = grid().labelled(["<s>", "a", " b", "c", "d", "e", "f"])._repr_html_()
    titles = re.findall(r'title="([^"]*)"', html)
    assert titles[:4] == ["d &lt;s&gt;: 0", "d a: 1", "d  b: 2", "d c: 3"]
    assert len(titles) == 24
    assert "head 5" in html
    assert "head 7" in html
    assert "·b" in html
    assert "<script" not in html
    colours = re.findall(r"background:(#\w+)", html)
    assert (colours[0], colours[-1]) == ("#f7fbff", "#08306b"), "white for the least, dark blue for the most"


def test_a_picture_of_much_is_thinned_out_and_says_so() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 100, 130))
    values[0, 0, 0] = 1000.0
    html = Array(values, ("layer", "pos", "d_model"))._repr_html_()
    assert len(html) < 700_000
    assert "1 of 40 maps, one in 2 rows and one in 3 columns" in html
    assert "of which 1 % is beyond the last colour" in html
    assert scale_of(np.arange(10.0)) == (0.0, 9.0, "0 to 9")
    masked = Array(np.array([[1.0, -np.inf]]), ("q_pos", "k_pos"))._repr_html_()
    assert "#d9d9d9" in masked
    assert "nan" not in masked


def test_tokens_have_texts_even_in_the_middle_of_a_character(client: Client) -> None:
    told = client.tokenize("Zug 🙂")
    assert told.texts[0] == "<|bos|>"
    assert "".join(told.texts[1:3]).startswith("Z")
    assert "\ufffd" in told.texts[-1]
    assert len(told.texts) == len(told.ids)
    assert client.detokenize(told.ids[1:4]).texts == told.texts[1:4]
    rendered = client.tokenize(messages=[{"role": "user", "content": "Hi"}])
    assert "".join(rendered.texts) == rendered.rendered


def test_every_reading_call_answers_for_several_prompts(client: Client) -> None:
    prompts = [TEXT, [5, 6, 7], [{"role": "user", "content": "Hi"}]]
    lengths = [client.hidden_states(prompt, layers=0).shape[1] for prompt in prompts]
    assert [a.shape[1] for a in client.hidden_states(prompts=prompts, layers=0)] == lengths
    assert [a.shape[3] for a in client.attention(prompts=prompts, layers="all", heads="all")] == lengths
    assert [a["hook_embed"].shape[0] for a in client.trace(prompts=prompts, points="hook_embed")] == lengths
    assert [lens.tokens.shape[1] for lens in client.logit_lens(prompts=prompts)] == lengths
    assert client.attention(prompts=[]) == []
    edited = client.trace(prompts=prompts[:2], points="resid_post.2", edits=Edit.zero("z.*", heads=1))
    plain = client.trace(prompts=prompts[:2], points="resid_post.2")
    assert all(
        np.abs(a["blocks.2.hook_resid_post"] - b["blocks.2.hook_resid_post"]).max() > 1e-3
        for a, b in zip(edited, plain, strict=True)
    )


def test_the_lens_tells_texts_and_takes_them(client: Client) -> None:
    lens = client.logit_lens(TEXT, top_k=2, tokens=[" France", 7], layers=[0, 3])
    ids = client.tokenize(" France", add_special_tokens=False).ids
    assert lens.given_logprobs.at["token"] == (*ids, 7)
    assert lens.texts.shape == lens.tokens.shape == (2, 5, 2)
    assert lens.texts.sel(layer=3, pos=4).values.tolist() == list(
        client.detokenize(lens.tokens.sel(layer=3, pos=4).values.tolist()).texts
    )
    html = lens.labelled(client.tokenize(TEXT).texts)._repr_html_()
    assert "·France" in html
    assert html.count("<span") == 2 * 5
    assert "<div" in client.logit_lens(TEXT, top_k=0, tokens=[7])._repr_html_()


def test_an_answer_has_its_captures(client: Client) -> None:
    answer = client.complete(TEXT, max_tokens=3, ignore_eos=True, captures=Capture("resid_post.1", norm=True))
    assert isinstance(answer.captures, Arrays)
    assert answer.captures["blocks.1.hook_resid_post"].positions == tuple(range(7))
    assert "blocks.1.hook_resid_post" in answer.captures._repr_html_()
    assert client.complete(TEXT, max_tokens=1).captures == {}


REFUSED = {
    "layers: 'first' cannot be sent: must be integers or 'all'": {"layers": "first"},
    "layers: [1.5] cannot be sent": {"layers": [1.5]},
    "positions: 0.5 cannot be sent": {"positions": [0.5]},
    "positions: 'first' is none of all, prompt": {"positions": "first"},
    "prompts: 'Hi' must be a list of prompts": {"prompts": "Hi"},
    "prompts: give prompts or token_ids, not both": {"prompts": ["Hi"], "token_ids": [3]},
    "prompts: give prompts or a prompt, not both": {"prompts": ["Hi"], "prompt": "Hi"},
    "request_id: one name cannot stand for several": {"prompts": ["Hi"], "request_id": "a"},
    "prompt: is a list of texts; give them as prompts=[...]": {"prompt": ["Hi", "you"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_told_by_name(client: Client, message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        client.hidden_states(
            **{"layers": [0], **({} if message.startswith("prompt") else {"prompts": ["Hi"]}), **REFUSED[message]}
        )


def test_an_error_says_which_of_the_prompts_it_is_about(client: Client) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client.hidden_states(prompts=["Hi", [5, 9999], "Ho"])
    assert refused.value.__notes__ == ["this is about prompts[1]"]


def test_wrong_things_among_captures_edits_and_tokens_are_told(client: Client) -> None:
    with pytest.raises(TypeError, match=r"captures\[0\]: 'hook_embed': must be a Capture"):
        client.generate(TEXT, captures=["hook_embed"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"edits\[1\]: 5: must be an Edit"):
        client.generate(TEXT, edits=[Edit.zero("z.1"), 5])  # type: ignore[list-item]
    with pytest.raises(InvalidArgument, match=r"tokens: ' France Paris' is 4 tokens \(.*\); it must be one"):
        client.logit_lens(TEXT, tokens=[" France Paris"])
    with pytest.raises(NotFound):
        client.abort("nobody")


def test_a_knock_out_takes_one_key_or_a_range(client: Client) -> None:
    for keys, hidden in ((0, [0]), (range(2), [0, 1]), ([0, range(2, 4)], [0, 2, 3])):
        edit = Edit.knock_out(1, "all", queries=[4], keys=keys)
        pattern = client.attention(TEXT, layers=1, queries=[4], edits=[edit])
        assert (pattern.values[..., hidden] == 0).all()
        assert np.allclose(pattern.values.sum(-1), 1)


async def test_the_asynchronous_client_does_the_same(client: Client, live: LiveServer) -> None:
    mine = client.logit_lens(TEXT, tokens=[" France"])
    async with AsyncClient(live.address) as other:
        theirs = await other.logit_lens(TEXT, tokens=[" France"])
        assert np.array_equal(theirs.texts.values, mine.texts.values)
        assert np.array_equal(theirs.given_ranks, mine.given_ranks)
        with pytest.raises(InvalidArgument, match="must be a list of prompts"):
            await other.attention(prompts="Hi")
        with pytest.raises(InvalidArgument) as refused:
            await other.attention(prompts=["Hi", [9999]])
        assert refused.value.__notes__ == ["this is about prompts[1]"]
