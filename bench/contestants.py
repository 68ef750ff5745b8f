"""Who is measured: our engine and our server, llama.cpp, vLLM and its server. Each is paused in another's turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from doors import GrpcDoor, OpenAiDoor
from launch import PASSIVE, LaunchError, Process, Worker, free_port, http_server, our_server, own_environment, worker
from replay import Door
from workload import Ask

WORKERS = Path(__file__).parent / "workers"  # a folder of their own: other modules here have names of packages
CONTEXT = 2048
# What our own options are for each kind of weights; as-is serves a GGUF file's own blocks.
OURS = {
    "bf16": ["--dtype", "bfloat16"],
    "int8": ["--dtype", "bfloat16", "--quantize", "int8"],
    "q8_0": ["--dtype", "bfloat16", "--quantize", "as-is"],
    "q4_0": ["--dtype", "bfloat16", "--quantize", "as-is"],
    "q4_1": ["--dtype", "bfloat16", "--quantize", "as-is"],
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where everything is. `models` holds bf16/ (Hugging Face) and bf16.gguf, q8_0.gguf, q4_0.gguf, q4_1.gguf."""

    models: Path
    llama: Path  # the folder with llama-batched-bench
    vllm: Path  # the Python that vLLM is installed in
    preload: tuple[Path, ...]  # libraries that vLLM wants: its OpenMP, tcmalloc
    threads: int
    our_options: tuple[str, ...] = ()

    def model(self, weights: str) -> Path:
        """The file or directory with these weights. Raises LaunchError if it is missing."""
        return found(self.models / (weights if weights == "bf16" else f"{weights}.gguf"))

    def ours(self, weights: str) -> list[str]:
        """Our command line for these weights."""
        model = self.model("bf16" if weights == "int8" else weights)
        options = ["--model", str(model), "--threads", str(self.threads), "--max-context", str(CONTEXT)]
        return [*options, *OURS[weights], *self.our_options]

    def vllm_environment(self) -> dict[str, str]:
        """What vLLM reads: its cores, 2 GiB of K/V, no telemetry."""
        last = self.threads - 1
        return {
            "LD_PRELOAD": ":".join(str(found(path)) for path in self.preload),
            "PYTHONPATH": "",
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{last}" if last else "0",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "PATH": f"{self.vllm.parent}:{os.environ.get('PATH', '')}",
        }  # fmt: skip


def found(path: Path) -> Path:
    """The path, if something is there. Raises LaunchError."""
    if not path.exists():
        raise LaunchError(f"{path} is not there; docs/performance.md says how to install the peers")
    return path


class Offline(Protocol):
    """Runs streams without a wire."""

    def streams(self, asks: Sequence[Ask]) -> dict[str, float]:
        """Rates of these streams, begun together: see `timeline.rates`."""

    def pause(self) -> None:
        """Take nothing from the machine until `resume`."""

    def resume(self) -> None:
        """Be ready to be measured."""


@dataclass(slots=True)
class ByWorker:
    """An engine in a process that stays, its model loaded once."""

    worker: Worker
    process: Process

    def streams(self, asks: Sequence[Ask]) -> dict[str, float]:
        """Rates of these streams."""
        answer = self.worker.ask(prompts=[ask.prompt for ask in asks], output=asks[0].output)
        return {name: float(str(value)) for name, value in answer.items()}

    def pause(self) -> None:
        """Stop the process."""
        self.process.pause()

    def resume(self) -> None:
        """Go on, and compute a little: what was paused finds its caches cold."""
        self.process.resume()
        self.worker.ask(prompts=[[1] * 16] * 2, output=4)


@dataclass(slots=True)
class Llama:
    """llama-batched-bench, which loads the model and warms up each time; its prompts are random tokens of its own."""

    program: Path
    model: Path
    threads: int

    def streams(self, asks: Sequence[Ask]) -> dict[str, float]:
        """Rates of so many streams of such lengths."""
        prompt, output, n = len(asks[0].prompt), max(asks[0].output, 1), len(asks)
        sizes = ["-npp", prompt, "-ntg", output, "-npl", n, "-c", max(512, n * (prompt + output)), "-ub", 512]
        threads = ["-t", self.threads, "-tb", self.threads]
        command = [self.program, "-m", self.model, *threads, *sizes, "--output-format", "jsonl"]
        parts = [str(part) for part in command]
        done = subprocess.run(parts, capture_output=True, text=True, check=False, env=own_environment())
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise LaunchError(f"{self.program.name} ended with {done.returncode}: {done.stderr[-800:]}")
        result = json.loads(lines[-1])
        return {"prompt_tokens_per_second": result["speed_pp"], "tokens_per_second": result["speed_tg"]}

    def pause(self) -> None:
        """It does not run between turns."""

    def resume(self) -> None:
        """It starts with each turn."""


@dataclass(slots=True)
class Served:
    """A server: the door into it, and its process to pause."""

    door: Door
    process: Process

    def pause(self) -> None:
        """Stop the process."""
        self.process.pause()

    def resume(self) -> None:
        """Let it go on; who asks it warms it up."""
        self.process.resume()


Contestant = Offline | Served


@contextmanager
def started(who: str, setting: Setting) -> Iterator[Contestant]:
    """A contestant by its name: PLACE WEIGHTS, such as "ours bf16", "our-server int8", "llama q4_0", "vllm bf16"."""
    place, weights = who.split()
    if place == "llama":
        model = found(setting.models / f"{weights}.gguf")
        yield Llama(found(setting.llama / "llama-batched-bench"), model, setting.threads)
    elif place == "ours":
        with worker([sys.executable, str(WORKERS / "run_ours.py"), *setting.ours(weights)], PASSIVE) as (one, process):
            yield ByWorker(one, process)
    elif place == "our-server":
        with our_server(setting.ours(weights)) as (address, process):
            yield Served(GrpcDoor(address), process)
    elif place == "vllm":
        command = [str(found(setting.vllm)), str(WORKERS / "run_vllm.py"), str(setting.model(weights)), "bfloat16"]
        with worker(command, setting.vllm_environment()) as (one, process):
            yield ByWorker(one, process)
    elif place == "vllm-server":
        with vllm_server(setting, weights) as served:
            yield served
    else:
        raise LaunchError(f"{who!r} is no contestant")


@contextmanager
def vllm_server(setting: Setting, weights: str) -> Iterator[Served]:
    """The server of vLLM, prefix caching off, serving the model as "m"."""
    port = free_port()
    command = [
        str(found(setting.vllm)), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setting.model(weights)),
        "--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64", "--no-enable-prefix-caching",
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m",
    ]  # fmt: skip
    with http_server(command, setting.vllm_environment(), port) as process:
        yield Served(OpenAiDoor("127.0.0.1", port), process)
