"""`cutaway inspect` against a real server: what it draws, saves and prints as JSON is what the model computed."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from cutaway import Capture, Client
from cutaway.cli import main
from cutaway.cli.shades import SHADES, HeatMap
from cutaway.plot import heat_map, lens_map
from rich.console import Console
from serving import LiveServer, serving

TEXT = "The capital of France is"


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


@pytest.fixture
def run(live: LiveServer):
    def run(*args: str, columns: int = 100, given: str | None = None) -> Result:
        environment = {"CUTAWAY_ADDRESS": live.address, "COLUMNS": str(columns)}
        return CliRunner(env=environment).invoke(main, ["inspect", *args], input=given)

    return run


def told(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_attention_in_json_is_the_clients(run, client: Client) -> None:
    whole = client.attention(TEXT)
    one = told(run("attention", TEXT, "--layers", "1", "--heads", "2", "--json"))
    assert one["axes"] == ["q_pos", "k_pos"]
    assert np.allclose(one["values"], whole.sel(layer=1, head=2).values, atol=1e-6)
    assert one["tokens"] == list(client.tokenize(TEXT).texts)
    heads = told(run("attention", TEXT, "--layers", "-1", "--query", "2", "--json"))
    assert heads["at"]["head"] == [0, 1, 2, 3]
    assert np.allclose(heads["values"], whole.sel(layer=2, q_pos=2).values[:, :3], atol=1e-6)
    layers = told(run("attention", TEXT, "--layers", "0-1", "--heads", "0,3", "--json"))
    assert np.allclose(layers["values"], whole.values[:2, [0, 3], -1].mean(1), atol=1e-6)


def test_hidden_lens_and_neurons_in_json_are_the_clients(run, client: Client) -> None:
    lengths = told(run("hidden", TEXT, "--json"))
    states = client.hidden_states(TEXT, layers=range(1, 4))
    assert lengths["axes"] == ["layer", "pos"]
    assert np.allclose(lengths["values"], np.linalg.norm(states.values, axis=-1), rtol=1e-5)
    of_head = told(run("hidden", TEXT, "--point", "z", "--head", "3", "--layers", "2", "--json"))
    z = client.trace(TEXT, points="z.2")["blocks.2.attn.hook_z"].sel(head=3)
    assert np.allclose(of_head["values"], [np.linalg.norm(z.values, axis=-1)], rtol=1e-5)
    lens = told(run("lens", TEXT, "--json", "--top", "2", "--layers", "3"))
    mine = client.logit_lens(TEXT, positions="last", top_k=2, layers=3)
    assert lens["ids"]["values"] == mine.tokens.values.tolist()
    assert lens["texts"]["values"] == mine.texts.values.tolist()
    found = told(run("neurons", TEXT, "--json", "--top", "5", "--position", "1"))
    posts = client.trace(TEXT, points="post.*")
    every = np.stack([array.values for array in posts.values()])  # [layer, pos, d_mlp]
    strongest = np.argsort(-np.abs(every[:, 1]).ravel())[:5]
    assert [tuple(each) for each in zip(found["at"]["layer"], found["at"]["neuron"], strict=True)] == [
        tuple(map(int, divmod(each, every.shape[2]))) for each in strongest
    ]
    assert np.allclose(found["values"], every.transpose(0, 2, 1).reshape(-1, len(found["tokens"]))[strongest])


def test_attention_is_drawn_with_tokens_on_both_sides(run, client: Client) -> None:
    lines = run("attention", TEXT, "--layers", "1", "--heads", "2").stdout.splitlines()
    tokens = [text.replace(" ", "·") for text in client.tokenize(TEXT).texts]
    assert lines[0] == "attention of layer 1, head 2"
    rows = lines[-len(tokens) - 1 : -1]
    assert [row.split()[0] for row in rows] == tokens
    assert rows[0].split()[1][:2] == SHADES[-1] * 2, "the first token sees itself only"
    header = lines[1 : -len(tokens) - 1]
    margin = max(map(len, tokens)) + 1
    column = "".join(line.ljust(200)[margin + 2 * (len(tokens) - 1)] for line in header).strip()
    assert column == tokens[-1], "a column's name reads from top to bottom"


def test_a_narrow_terminal_shows_the_last_columns_and_says_so(run) -> None:
    result = run("hidden", " ".join(["one two three"] * 30), columns=60)
    assert all(len(line) <= 60 for line in result.stdout.splitlines())
    assert "the last 26 of " in result.stdout


def test_cells_have_colours_where_there_are_some_and_signs_where_not() -> None:
    picture = HeatMap(np.array([[-4.0, 0.0, 2.0, -np.inf]]), ["a"], ["b"] * 4, "t")
    coloured = Console(force_terminal=True, color_system="truecolor", width=40)
    with coloured.capture() as seen:
        coloured.print(picture)
    assert "48;2;165;15;21m" in seen.get()
    assert "48;2;247;251;255m" in seen.get()
    plain = Console(force_terminal=False, width=40)
    with plain.capture() as seen:
        plain.print(picture)
    assert "a █-··▒▒" in seen.get()


def test_wide_letters_keep_the_columns_straight() -> None:
    console = Console(width=40)
    with console.capture() as seen:
        console.print(HeatMap(np.eye(3), ["日本", "a", "b"], ["日", "b", "語c"], "t"))
    _, first, second, *rows, _ = seen.get().splitlines()
    assert (first, second) == ("         語", "     日b c")
    assert rows[:2] == ["日本 ██····", "   a ··██··"]


@pytest.mark.parametrize("command", ["attention", "hidden", "lens", "neurons"])
def test_every_picture_can_be_saved(run, tmp_path: Path, command: str) -> None:
    file = tmp_path / "a.png"
    assert run(command, TEXT, "--png", str(file)).exit_code == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 300
    assert height > 150


def test_figures_show_the_values_and_their_names(client: Client) -> None:
    array = client.attention(TEXT, layers=1).labelled(client.tokenize(TEXT).texts)
    figure = heat_map(array, title="heads")
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [f"layer 1, head {head}" for head in range(4)]
    assert np.allclose(drawn[2].images[0].get_array(), array.sel(layer=1, head=2).values)
    assert drawn[0].get_xticklabels()[-1].get_text() == "·is"
    assert figure.get_suptitle() == "heads"
    lens = client.logit_lens(TEXT, top_k=1)
    [axis, _] = lens_map(lens).axes
    assert axis.texts[0].get_text() == lens.texts[-1, 0, 0].replace(" ", "·")[:10], "the last layer is on top"
    assert np.allclose(axis.images[0].get_array(), np.exp(lens.logprobs.values[::-1, :, 0]))
    with pytest.raises(ValueError, match="no likeliest tokens"):
        lens_map(client.logit_lens(TEXT, top_k=0, tokens=[5]))
    [empty] = client.trace(TEXT, captures=[Capture("resid_post.1", norm=True)]).values()
    assert len(heat_map(empty).axes) == 2, "an array of one axis is one row"


def test_the_prompt_may_be_tokens_a_message_or_standard_input(run) -> None:
    assert told(run("hidden", "--token-ids", "5,6,7", "--json"))["at"]["pos"] == [0, 1, 2]
    assert told(run("hidden", "--json", given="Hi\n"))["tokens"] == ["<|bos|>", "H", "i"]
    assert told(run("hidden", "--chat", "Hi", "--json"))["tokens"][0] == "<|im_start|>"
    assert "takes the place of PROMPT" in run("hidden", "Hi", "--token-ids", "5").stderr


def test_points_are_listed(run, client: Client) -> None:
    assert [point["name"] for point in told(run("points", "--json"))["points"]] == [
        point.name for point in client.list_points()
    ]
    assert "blocks.{i}.attn.hook_pattern" in run("points", columns=160).stdout


REFUSED = {
    "'2-' is not of the form 3, 0,5,-1, 4-9 or all": ["attention", "Hi", "--layers", "2-"],
    "the model has 3 layers: 0 to 2": ["attention", "Hi", "--layers", "7"],
    "z has heads; choose one with --head": ["hidden", "Hi", "--point", "z"],
    "the nearest:": ["hidden", "Hi", "--point", "residpost"],
    "nowhere/a.png' cannot be written": ["hidden", "Hi", "--png", "nowhere/a.png"],
    "a.what' cannot be written: Format 'what' is not supported": ["lens", "Hi", "--png", "a.what"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_told_in_a_line(run, message: str) -> None:
    result = run(*REFUSED[message])
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_without_matplotlib_only_pictures_in_files_are_missing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cutaway.plot")
    monkeypatch.setitem(sys.modules, "cutaway.plot", None)
    assert "pip install 'cutaway[plot]'" in run("lens", "Hi", "--png", "a.png").stderr
    assert run("lens", "Hi").exit_code == 0
