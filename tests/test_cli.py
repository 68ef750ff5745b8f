"""The command `cutaway` against a real gRPC server: what it asks, prints and exits with."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result
from cutaway.cli import main
from cutaway.cli.options import OUTPUT, SAMPLING
from cutaway.options import GenerateOptions, Sampling
from cutaway.v1 import inference_pb2 as pb
from scripted import Scripted, delta, finished, hello, serve, started

PATIENCE = 10
COMMAND = Path(sys.executable).with_name("cutaway")


@pytest.fixture
def servicer() -> Scripted:
    return Scripted(hello)


@pytest.fixture
def address(servicer: Scripted) -> Iterator[str]:
    server, address = serve(servicer)
    yield address
    server.stop(None).wait()


@pytest.fixture
def run(address: str):
    def run(*args: str, given: str | bytes | None = None) -> Result:
        return CliRunner(env={"CUTAWAY_ADDRESS": address}).invoke(main, args, input=given)

    return run


def test_help_and_version_answer_at_once() -> None:
    took = []
    for _ in range(3):  # the machine may be busy: the best of three
        began = time.monotonic()
        shown = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, timeout=PATIENCE, check=True)
        took.append(time.monotonic() - began)
    assert min(took) < 0.5
    assert all(name in shown.stdout for name in ("generate", "chat", "tokenize", "model", "CUTAWAY_ADDRESS"))
    assert "0.1.0" in CliRunner().invoke(main, ["--version"]).output


def test_generate_writes_the_text(run, servicer) -> None:
    result = run("generate", "Hi", "--max-tokens", "64", "--temperature", "0")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello wörld\n", "")
    sampling = pb.SamplingParams(max_tokens=64, temperature=0.0)
    assert servicer.asked == [pb.GenerateRequest(text="Hi", sampling=sampling)]


def test_generate_json_is_one_object(run) -> None:
    result = run("generate", "Hi", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "Hello wörld"
    assert answer["token_ids"] == [5, 6, 7]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 3}
    assert answer["timings"]["queue_seconds"] == 0.5
    assert answer["completions"][0]["tokens"][0]["top_logprobs"] == [{"id": 5, "logprob": -0.5}]
    assert answer["started"]["seed"] == 7


def test_generate_json_stream_is_a_line_per_token_and_one_for_the_end(run) -> None:
    lines = [json.loads(line) for line in run("generate", "Hi", "--json", "--stream").stdout.splitlines()]
    assert [line["event"] for line in lines] == ["token", "token", "token", "finished"]
    assert [line["id"] for line in lines[:3]] == [5, 6, 7]
    assert lines[3]["finish_reason"] == "stop"


def test_the_prompt_may_come_from_standard_input(run, servicer) -> None:
    for args in (["generate"], ["generate", "-"]):
        assert run(*args, given="héllo\n\n").exit_code == 0
        assert servicer.asked[-1].text == "héllo\n"
    assert run("generate", "", given="not read").exit_code == 0
    assert servicer.asked[-1].text == ""
    result = run("generate", given=b"\xff")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "UTF-8" in result.stderr


def test_the_prompt_may_be_tokens_or_a_message(run, servicer) -> None:
    run("generate", "--token-ids", "1, 2 3")
    assert list(servicer.asked[-1].token_ids.ids) == [1, 2, 3]
    run("generate", "--chat", "Hi")
    assert servicer.asked[-1].chat == pb.Chat(messages=[pb.Message(role="user", content="Hi")])
    run("generate", "--system", "Be brief.", "Hi")
    assert [m.role for m in servicer.asked[-1].chat.messages] == ["system", "user"]


# Each keyword of `generate`, how it is written on the command line, and what must arrive.
WRITTEN: dict[str, tuple[list[str], object]] = {
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "4"], 4),
    "top_p": (["--top-p", "0.75"], 0.75),
    "min_p": (["--min-p", "0.25"], 0.25),
    "typical_p": (["--typical-p", "0.5"], 0.5),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5),
    "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5),
    "logit_bias": (["--logit-bias", "3=-1.5", "--logit-bias", "4=2"], {3: -1.5, 4: 2.0}),
    "bad_words": (["--bad-word", "a", "--bad-word", "b"], ["a", "b"]),
    "seed": (["--seed", "-9"], -9),
    "stop": (["--stop", "END"], ["END"]),
    "stop_token_ids": (["--stop-token-id", "0", "--stop-token-id", "2"], [0, 2]),
    "min_tokens": (["--min-tokens", "0"], 0),
    "max_tokens": (["--max-tokens", "0"], 0),
    "ignore_eos": (["--no-ignore-eos"], False),
    "n": (["-n", "2"], 2),
    "logprobs": (["--json", "--logprobs", "0"], 0),
    "prompt_logprobs": (["--json", "--prompt-logprobs", "2"], 2),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_sampling_option_reaches_the_server(run, servicer, name: str) -> None:
    args, value = WRITTEN[name]
    assert run("generate", "Hi", *args).exit_code == 0
    sampling = servicer.asked[-1].sampling
    assert [field.name for field, _ in sampling.ListFields()] == [name]
    told = getattr(sampling, name)
    assert (dict(told) if isinstance(value, dict) else list(told) if isinstance(value, list) else told) == value


def test_every_keyword_has_its_option() -> None:
    assert set(WRITTEN) == set(Sampling.__annotations__)
    known = {parameter.name for parameter in main.commands["generate"].params}
    prompts = {"token_ids", "messages", "add_generation_prompt"}  # --token-ids, --chat; not needed for one message
    inside = {"captures", "edits", "max_capture_bytes"}  # values that no option could write
    assert set(GenerateOptions.__annotations__) <= known | prompts | inside
    assert len(SAMPLING) + len(OUTPUT) + len(prompts | inside | {"timeout"}) == len(GenerateOptions.__annotations__)


def test_several_completions_are_printed_one_after_the_other(run, servicer) -> None:
    def two(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="a"))
        yield delta(pb.Token(id=2, text="b"), index=1)
        yield finished(*(pb.Completion(index=i, finish_reason="FINISH_REASON_LENGTH") for i in range(2)))

    servicer.script = two
    assert run("generate", "Hi", "-n", "2").stdout == "-- 0 (length)\na\n-- 1 (length)\nb\n"


def test_several_completions_are_shown_as_they_come_and_then_one_after_the_other(address, servicer) -> None:
    seen = threading.Event()

    def three(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="first words"))
        time.sleep(0.2)
        yield delta(pb.Token(id=2, text="other\nwords \x1b[2J"), index=1)
        time.sleep(0.2)
        yield delta(pb.Token(id=3, text="日本" * 80 + "end of the line"), index=2)
        assert seen.wait(PATIENCE)
        yield finished(*(pb.Completion(index=i, finish_reason="FINISH_REASON_LENGTH") for i in range(3)))

    servicer.script = three
    with Terminal(address, "generate", "Hi", "-n", "3") as terminal:
        terminal.expect("waiting for the first token")
        terminal.expect("first words")
        terminal.expect("other words \ufffd[2J")
        terminal.expect("end of the line")
        seen.set()
        shown = terminal.everything()
    assert shown.index("-- 0 (length)") < shown.index("-- 1 (length)") < shown.index("-- 2 (length)")
    assert "16.0 tokens/s" in shown


@pytest.mark.parametrize("wrong", ["localhost", "example.org", "::1", "[::1]", "http://localhost:1", "localhost:0", ""])
def test_an_address_without_a_port_is_refused_at_once(wrong: str) -> None:
    result = CliRunner().invoke(main, ["--address", wrong, "model", "--timeout", "60"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: address: {wrong!r} is not HOST:PORT")


def test_the_address_may_stand_before_or_behind_the_command(address: str) -> None:
    elsewhere = {"CUTAWAY_ADDRESS": "127.0.0.1:1"}
    for args in (["--address", address, "model"], ["model", "--address", address]):
        result = CliRunner(env=elsewhere).invoke(main, args)
        assert result.exit_code == 0, result.stderr
        assert "tiny" in result.stdout


# What goes wrong.


def test_an_error_is_one_line_on_stderr_and_exit_code_1(run, servicer) -> None:
    def refuses(request, context):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature: -1.0 is not allowed:\nmust be >= 0")
        yield

    servicer.script = refuses
    for args in ([], ["--json"], ["--json", "--stream"], ["-n", "2"]):
        result = run("generate", "Hi", "--temperature", "-1", *args)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "Error: sampling.temperature: -1.0 is not allowed: must be >= 0\n"


def test_an_error_in_the_middle_of_a_text_has_a_line_of_its_own(run, servicer) -> None:
    def breaks(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="Hello", step=1))
        context.abort(grpc.StatusCode.INTERNAL, "burst")

    servicer.script = breaks
    result = run("generate", "Hi")
    assert (result.exit_code, result.output) == (1, "Hello\nError: INTERNAL: burst\n")


def test_nobody_at_the_address_is_exit_code_1() -> None:
    result = CliRunner().invoke(main, ["--address", "127.0.0.1:1", "model"])
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "Hi", "--temperature", "hot"],
        ["generate", "Hi", "--logit-bias", "3"],
        ["generate", "Hi", "--temperatur", "1"],
        ["generate", "--token-ids", "1,x"],
        ["generate", "Hi", "--token-ids", "1"],
        ["generate", "Hi", "--stream"],
        ["generate", "Hi", "--logprobs", "1"],
        ["generate", "Hi", "--prompt-logprobs", "1"],
        ["nonsense"],
    ],
)
def test_a_usage_error_is_exit_code_2(run, servicer, args: list[str]) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr
    assert servicer.asked == []


@pytest.mark.parametrize("script", ["endless", "silent"])
@pytest.mark.parametrize("args", [["generate", "Hi"], ["generate", "Hi", "--json"], ["chat"]])
def test_ctrl_c_cancels_on_the_server_and_exits_130(address, servicer, script: str, args: list[str]) -> None:
    servicer.script = getattr(servicer, script)
    process = start(address, *args)
    with process:
        if args == ["chat"]:
            assert process.stdin is not None
            process.stdin.write(b"Hi\n")
            process.stdin.flush()
        wait_until(lambda: servicer.asked)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert servicer.cancelled.wait(PATIENCE)
        if args == ["chat"]:  # the first stops the answer, the second the program
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"Traceback" not in told


def test_a_reader_that_goes_away_cancels_on_the_server(address, servicer) -> None:
    servicer.script = servicer.endless
    with start(address, "generate", "Hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"xx"
        process.stdout.close()  # as `head` does
        assert servicer.cancelled.wait(PATIENCE)
        assert process.wait(PATIENCE) == 1
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


# The other commands.


def test_tokenize_prints_a_line_per_token(run, servicer) -> None:
    result = run("tokenize", "lowest")
    assert result.stdout == "3\tlow\t0\t3\n4\tĠest\t3\t7\n"
    assert servicer.asked[-1] == pb.TokenizeRequest(text="lowest", merges=False)
    assert json.loads(run("tokenize", "lowest", "--json").stdout)["offsets"] == [[0, 3], [3, 7]]
    run("tokenize", "--chat", "--no-add-special-tokens", given="x\n")
    assert servicer.asked[-1].chat.messages[0].content == "x"
    assert servicer.asked[-1].HasField("add_special_tokens")


def test_tokenize_draws_the_merges(run) -> None:
    drawn = run("tokenize", "lowest", "--merges").stdout.splitlines()[3:]
    assert drawn == ["l·o·w", "lo·w    l + o  rank 4", "low     lo + w  rank 9"]


def test_model_tells_the_facts(run) -> None:
    shown = run("model").stdout
    assert "123" in shown
    assert "8 pages of 16 tokens" in shown
    assert "1 layers of [16] tokens" in shown
    assert json.loads(run("model", "--json").stdout)["default_sampling"]["logit_bias"] == {"3": -1.0}


def test_chat_remembers_resets_and_quits(run, servicer) -> None:
    said = "Hi\n\nAnd?\n/reset\nAgain\n/quit\nnever\n"
    result = run("chat", "--system", "Be brief.", "--temperature", "0", given=said)
    assert result.exit_code == 0
    assert result.stdout.count("Hello wörld") == 3
    turns = [[(m.role, m.content) for m in asked.chat.messages] for asked in servicer.asked]
    system, answer = ("system", "Be brief."), ("assistant", "Hello wörld")
    assert turns == [
        [system, ("user", "Hi")],
        [system, ("user", "Hi"), answer, ("user", "And?")],
        [system, ("user", "Again")],
    ]
    assert servicer.asked[0].sampling.temperature == 0.0


# A terminal.


def test_a_terminal_gets_a_spinner_the_text_and_the_figures(address, servicer) -> None:
    def slow(request, context):
        time.sleep(0.3)
        yield from hello(request, context)

    servicer.script = slow
    shown = at_a_terminal(address, "generate", "Hi")
    assert "waiting for the first token" in shown
    assert "Hello wörld" in shown
    assert shown.index("waiting") < shown.index("Hello")
    assert "16.0 tokens/s" in shown
    assert "1 of 3 prompt tokens cached" in shown


def test_a_terminal_never_gets_the_models_control_characters(address, servicer) -> None:
    def nasty(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="a\x1b]0;owned\x07\x9b31mb\tc"))
        yield finished()

    servicer.script = nasty
    shown = at_a_terminal(address, "generate", "Hi")
    assert "a\ufffd]0;owned\ufffd\ufffd31mb" in shown
    assert "\x1b]0;" not in shown
    piped = CliRunner(env={"CUTAWAY_ADDRESS": address}).invoke(main, ["generate", "Hi"])
    assert piped.stdout == "a\x1b]0;owned\x07\x9b31mb\tc\n"  # a pipe gets what there is


def test_chat_at_a_terminal_stops_an_answer_and_goes_on(address, servicer) -> None:
    servicer.script = servicer.endless
    with Terminal(address, "chat") as terminal:
        terminal.expect("you>")
        terminal.type("Hi\n")
        terminal.expect("xxx")
        terminal.type("\x03")
        assert servicer.cancelled.wait(PATIENCE)
        terminal.expect("(stopped)")
        terminal.expect("you>")
        servicer.script = hello
        terminal.type("More\n")
        terminal.expect("Hello wörld")
        terminal.expect("you>")
        assert terminal.interrupt() == 130
    roles = [message.role for message in servicer.asked[-1].chat.messages]
    assert roles == ["user", "assistant", "user"]


def test_tokenize_colours_the_pieces_on_a_terminal_only(address: str) -> None:
    assert "\x1b[30m\x1b[44mlow\x1b[0m" in at_a_terminal(address, "tokenize", "lowest")


def test_no_color_means_no_colour(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = at_a_terminal(address, "tokenize", "lowest")
    assert "low" in shown
    assert "\x1b[" not in shown


def start(address: str, *args: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "CUTAWAY_ADDRESS": address}
    return subprocess.Popen([COMMAND, *args], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Makes standard input the controlling terminal, so that its Ctrl-C is a signal, and becomes the command.
CONTROLLED = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command on a pseudo terminal."""

    def __init__(self, address: str, *args: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "CUTAWAY_ADDRESS": address, "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, COMMAND, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> None:
        """Read until `text` comes; what stands after it is kept for the next."""
        deadline = time.monotonic() + PATIENCE
        while text.encode() not in self._seen:
            assert time.monotonic() < deadline, (text, self._seen[-2000:])
            self._read()
        self._seen = self._seen.split(text.encode(), 1)[1]

    def interrupt(self) -> int:
        """Press Ctrl-C at a prompt, again if it came just before readline began to wait; the exit code."""
        for _ in range(PATIENCE):
            self.type("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(5)
        raise AssertionError("Ctrl-C does not end it")

    def everything(self) -> str:
        """What is shown until the command ends."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < deadline
        return self._seen.decode()

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 0.5)[0]:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self._seen += data
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def at_a_terminal(address: str, *args: str) -> str:
    with Terminal(address, *args) as terminal:
        shown = terminal.everything()
        assert terminal.process.wait(PATIENCE) == 0
        return shown
