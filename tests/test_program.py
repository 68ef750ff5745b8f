"""`cutaway-server` as a program: when it says it serves, how it goes down, and with which exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from cutaway.v1 import inference_pb2 as v1
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import asking, program, stub, tokens_of
from tiny import save_tiny

PROMPT = list(range(40, 60))
# A tiny model is too quick to be caught at work: each step takes a while longer.
UNHURRIED = "import time\nfrom cutaway_server.engine.engine import Engine\nstep = Engine.step\n"
UNHURRIED += "Engine.step = lambda engine: (time.sleep(0.01), step(engine))[1]"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return str(path)


def ended(process: subprocess.Popen[str], seconds: float = 20) -> tuple[int, str]:
    output, log = process.communicate(timeout=seconds)
    assert output == "", "one line is all that standard output gets"
    return process.returncode, log


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value.code()


def states(address: str) -> Iterator[int]:
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="cutaway.v1.Inference"))
        yield from (answer.status for answer in watch)


def test_sigterm_drains_not_serving_first_running_streams_finish_new_ones_are_refused(tiny: str) -> None:
    with program("--model", tiny, code=UNHURRIED) as (address, process), stub(address) as client:
        watch = states(address)
        assert next(watch) == health_pb2.HealthCheckResponse.SERVING
        running = client.Generate(asking(PROMPT, max_tokens=150))
        responses = [next(running), next(running)]
        process.send_signal(signal.SIGTERM)
        assert next(watch) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert code_of(client.Generate(asking(PROMPT))) is grpc.StatusCode.UNAVAILABLE
        responses += list(running)
        assert len(tokens_of(responses)) == 150
        code, log = ended(process)
        assert (code, "Traceback" in log) == (0, False), log


def test_what_outlasts_the_drain_timeout_ends_as_unavailable(tiny: str) -> None:
    options = ("--model", tiny, "--drain-timeout", "0.3")
    with program(*options, code=UNHURRIED) as (address, process), stub(address) as client:
        running = client.Generate(asking(PROMPT))
        next(running)
        process.send_signal(signal.SIGINT)
        assert code_of(running) is grpc.StatusCode.UNAVAILABLE
        assert ended(process)[0] == 0


def test_a_second_signal_stops_at_once(tiny: str) -> None:
    with program("--model", tiny, code=UNHURRIED) as (address, process), stub(address) as client:
        running = client.Generate(asking(PROMPT))
        next(running)
        process.send_signal(signal.SIGTERM)
        assert code_of(client.Generate(asking(PROMPT))) is grpc.StatusCode.UNAVAILABLE
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert code_of(running) is grpc.StatusCode.UNAVAILABLE
        assert ended(process)[0] == 1
        assert time.monotonic() - start < 3


def test_a_failed_engine_ends_the_program_with_1_and_its_cause_in_the_log(tiny: str) -> None:
    code = "from cutaway_server.engine.engine import Engine\nstep = Engine.step\ndef fail(engine):\n"
    code += " if 'live' not in engine.live: return step(engine)\n raise RuntimeError('the boiler burst')\n"
    code += "Engine.step = fail"
    with program("--model", tiny, code=code) as (address, process), stub(address) as client:
        assert code_of(client.Generate(asking(PROMPT, ask_request_id="live"))) is grpc.StatusCode.INTERNAL
        exit_code, log = ended(process)
        assert (exit_code, "the boiler burst" in log) == (1, True)


def test_a_signal_during_a_download_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts, and never answers
        environment = {
            **os.environ, "CUTAWAY_CACHE": str(tmp_path), "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
        }  # fmt: skip
        command = [sys.executable, "-m", "cutaway_server", "--model", "smollm2", "--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            connection, _ = index.accept()
            [pip] = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + signal.SIGTERM
            connection.close()
            assert not pip.is_running() or pip.status() == psutil.STATUS_ZOMBIE
    assert list(tmp_path.rglob("fetch-*")) == []


def test_a_step_that_has_no_room_for_all_that_may_run_is_refused(tiny: str) -> None:
    options = ["--model", tiny, "--max-batch-tokens", "3", "--max-running", "4", "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, "-m", "cutaway_server", *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--max-batch-tokens: 3 is less than --max-running 4" in done.stderr


def test_threads_that_tokenise_leave_the_interpreter_to_a_step_soon(tiny: str) -> None:
    code = (
        "import atexit, sys\natexit.register(lambda: print('switches after', sys.getswitchinterval(), file=sys.stderr))"
    )
    with program("--model", tiny, code=code) as (_, process):
        process.send_signal(signal.SIGTERM)
        assert "switches after 0.0005" in ended(process)[1]


def test_without_the_servers_packages_the_command_says_what_to_install() -> None:
    code = "import sys\nsys.modules['pydantic'] = None\nfrom cutaway_server.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "cutaway-server: pydantic is missing: install the server with `pip install 'cutaway[server]'`\n"
    )


def test_a_taken_port_is_told_before_the_model_is_loaded(tiny: str) -> None:
    with program("--model", tiny) as (address, _):
        command = [sys.executable, "-m", "cutaway_server", "--model", "/nowhere", "--listen", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"cutaway-server: --listen: '{address}' cannot be listened on" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_while_the_model_loads_the_server_answers_not_serving(tiny: str, tmp_path: Path) -> None:
    code = "import time, cutaway_server.__main__ as main_module, cutaway_server.service.server as server\n"
    code += "listen, load = server.Server.listen, main_module.load\n"
    code += "async def tell(self):\n address = await listen(self)\n print('listening on', address, flush=True)\n"
    code += " return address\nserver.Server.listen = tell\n"
    code += "main_module.load = lambda config: (time.sleep(1.5), load(config))[1]"
    with program("--model", tiny, code=code) as (address, _), stub(address) as client:
        watch = states(address)
        assert next(watch) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as raised:
            client.GetModel(v1.GetModelRequest())
        assert (raised.value.code(), "loaded" in raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, True)
        assert next(watch) == health_pb2.HealthCheckResponse.SERVING
        assert len(tokens_of(list(client.Generate(asking(PROMPT, max_tokens=3))))) == 3
