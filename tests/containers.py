"""A real Docker engine, the images built by it, and what compose.yaml brings up: for tests marked `docker`.

An engine that is there is used. Where there is none, `tests/docker/engine` makes one, and what can't be pulled is stood
in for under the same name: the base by Debian with its Python, Prometheus by Debian's. pip's settings of this machine
(certificates, index, wheels at hand) go along into the build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "deploy/compose.yaml"
DOCKERFILE = ROOT / "deploy/Dockerfile"
SCRIPT = ROOT / "tests/docker/engine"
HOME = Path(os.environ.get("DOCKER_ENGINE_DIR") or Path.home() / ".cache/cutaway-docker-engine")
BUILD_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Engine:
    """Where the engine is: what to set to talk to it, and what to put before a command to be in its network."""

    environment: Mapping[str, str]
    inside: tuple[str, ...] = ()

    def run(
        self, *command: str, check: bool = True, seconds: float = 300, given: str | None = None, **environment: str
    ) -> Any:
        """Run a command with this engine, `given` what it reads; its output is text."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, input=given, capture_output=True, text=True,
            timeout=seconds, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def docker(self, *arguments: str, **options: Any) -> str:
        """What `docker` prints."""
        return str(self.run("docker", *arguments, **options).stdout).strip()

    def has(self, image: str) -> bool:
        """Whether the image is there, or can be pulled."""
        if self.run("docker", "image", "inspect", image, check=False).returncode == 0:
            return True
        return bool(self.run("docker", "pull", "-q", image, check=False, seconds=600).returncode == 0)


def base_image() -> str:
    """What the Dockerfile builds on."""
    found = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def engine_with_images(scratch: Path, prometheus: str) -> Engine:
    """An engine that has the CPU image, the tools' image and Prometheus's, as compose.yaml names them."""
    there = Engine(dict(os.environ))
    if shutil.which("docker") and there.run("docker", "info", check=False).returncode == 0:
        _build(there, scratch, prometheus, own=False)
        return there
    own = _own_engine()  # first on this machine's network, to build, then with networks of its own, to run
    _build(own, scratch, prometheus, own=True)
    subprocess.run([SCRIPT, "stop", HOME], check=True)
    subprocess.run([SCRIPT, "start", HOME, "--bridge"], check=True, stdout=subprocess.DEVNULL)
    namespace = ("nsenter", "-t", (HOME / "dockerd.pid").read_text().strip(), "-n")
    return Engine(own.environment, namespace)


def stop_own() -> None:
    """Stop our own engine, if there is one."""
    subprocess.run([SCRIPT, "stop", HOME], check=True)


def _own_engine() -> Engine:
    subprocess.run([SCRIPT, "stop", HOME], check=True)
    subprocess.run([SCRIPT, "start", HOME], check=True, stdout=subprocess.DEVNULL)
    variables = {"DOCKER_HOST": f"unix://{HOME}/docker.sock", "DOCKER_CONFIG": f"{HOME}/config"}
    return Engine({**os.environ, **variables, "PATH": f"{HOME}/bin:{os.environ['PATH']}"})


def _build(engine: Engine, scratch: Path, prometheus: str, *, own: bool) -> None:
    base = base_image()
    if not engine.has(base):
        assert own, f"{base} can't be pulled"
        subprocess.run([SCRIPT, "base", HOME, base], check=True, stdout=subprocess.DEVNULL)
    pip = _pip_settings(scratch)
    for target, tag, more in (("server", "cpu", ("--build-arg", "VARIANT=cpu")), ("tools", "tools", ())):
        engine.docker(
            *("build", "--network", "host", "-q", "-f", str(DOCKERFILE), "--target", target, *more, *pip),
            *("-t", f"cutaway:0.1.0-{tag}", str(ROOT)),
            seconds=BUILD_SECONDS,
        )
    if not engine.has(prometheus):
        standin = str(ROOT / "tests/docker/prometheus.Dockerfile")
        engine.docker(
            *("build", "--network", "host", "-q", "-f", standin, "--build-arg", f"BASE={base}", "-t", prometheus),
            str(ROOT / "tests/docker"),
            seconds=BUILD_SECONDS,
        )


def _pip_settings(scratch: Path) -> tuple[str, ...]:
    """This machine's certificates, index and wheels, as arguments of a build."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE))
    config, arguments = ["[global]"], []
    if url := settings.get("index-url"):
        config.append(f"index-url = {url}")
    if certificates := settings.get("cert"):
        config.append("cert = /run/secrets/ca")
        arguments += ["--secret", f"id=ca,src={certificates}"]
    wheels = Path(settings.get("find-links", ""))
    if settings.get("find-links") and wheels.is_dir():
        arguments += ["--build-context", f"wheels={wheels}"]
        if list(wheels.glob("torch-*+cpu-*.whl")):  # no need of torch's own index
            arguments += ["--build-arg", f"TORCH_CPU_INDEX={settings.get('index-url', 'https://pypi.org/simple')}"]
    (scratch / "pip.conf").write_text("\n".join(config) + "\n")
    return (*arguments, "--secret", f"id=pip,src={scratch / 'pip.conf'}")


@dataclass(frozen=True, slots=True)
class Stack:
    """compose.yaml with --profile cpu, as a project of its own."""

    engine: Engine
    environment: Mapping[str, str]

    def compose(self, *arguments: str, check: bool = True, given: str | None = None, **environment: str) -> Any:
        """Run `docker compose` on it."""
        command = ("docker", "compose", "-p", "cutaway-test", "-f", str(COMPOSE), "--profile", "cpu", *arguments)
        return self.engine.run(*command, check=check, given=given, **{**self.environment, **environment})

    def up(self) -> None:
        """All but Grafana, whose image nothing here can stand in for; returns when all are healthy."""
        self.compose("up", "-d", "--wait", "--no-build", "secrets", "server-cpu", "prometheus")

    def tool(self, program: str, *arguments: str, service: str = "client", **options: Any) -> Any:
        """Run a program of the tools' image, as an operator would."""
        return self.compose("run", "--rm", "-T", "--entrypoint", program, service, *arguments, **options)

    def address(self, service: str, port: int) -> str:
        """Where a port is published."""
        return str(self.compose("port", service, str(port)).stdout).strip()

    def inspect(self, service: str) -> Any:
        """What the engine knows of a service's container."""
        container = str(self.compose("ps", "-a", "-q", service).stdout).strip()
        return json.loads(self.engine.docker("inspect", container))[0]

    def python(self, code: str, **environment: str) -> subprocess.Popen[str]:
        """Python with our client, where the published ports can be reached."""
        return subprocess.Popen(
            [*self.engine.inside, sys.executable, "-c", code],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
