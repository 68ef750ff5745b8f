"""64 streams at once, cancelled, timed out and killed at random: nothing leaks, and what is answered is right."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch
from cutaway.v1 import inference_pb2 as v1
from serving import LiveServer, asking, eventually, serving, stub, tokens_of
from tiny import save_tiny

N_TOKENS = 48
N_THREADS, N_PROCESSES, STREAMS_EACH = 48, 4, 4
EXPECTED = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}
# A client program that streams until it is killed; it says so once every stream has begun.
CLIENT = f"""
import sys, threading
from serving import asking, stub
begun = threading.Semaphore(0)
def stream(client):
    for count, _ in enumerate(client.Generate(asking(list(range(40, 140)), temperature=1.0, n=2))):
        if count == 1: begun.release()
with stub(sys.argv[1]) as client:
    threads = [threading.Thread(target=stream, args=(client,)) for _ in range({STREAMS_EACH})]
    [thread.start() for thread in threads]
    begun.acquire()
    print("streaming", flush=True)
    [thread.join() for thread in threads]
"""


def prompts() -> list[list[int]]:
    chance = random.Random(5)
    shared = [chance.randrange(4, 512) for _ in range(50)]  # some begin alike, so that pages are shared
    return [shared[: 10 * i] + [chance.randrange(4, 512) for _ in range(5 + i)] for i in range(6)]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(N_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def one_client(live: LiveServer, chance: random.Random, expected: list[tuple[list[int], list[int]]]) -> str:
    """Stream something, to the end or not; what happened."""
    prompt, answer = chance.choice(expected)
    fate = chance.choice(["finish", "cancel", "deadline", "abort", "vanish"])
    name = f"client-{chance.randrange(10**9)}"
    with stub(live.address) as client:
        timeout = chance.uniform(0.02, 1.5) if fate == "deadline" else None
        call = client.Generate(asking(prompt, max_tokens=N_TOKENS, ask_request_id=name), timeout=timeout)
        received: list[Any] = []
        patience = chance.randrange(0, N_TOKENS // 2)
        try:
            for response in call:
                received.append(response)
                if len(received) > patience and fate == "cancel":
                    call.cancel()
                elif len(received) > patience and fate == "vanish":
                    return fate  # the channel is closed under the stream
                elif len(received) == patience and fate == "abort":
                    _abort(client, name)
        except grpc.RpcError as error:
            if error.code() is not EXPECTED.get(fate):
                raise
        tokens = tokens_of(received)
        assert tokens == answer[: len(tokens)], "whatever is streamed is right"
        assert fate != "finish" or len(tokens) == N_TOKENS
    return fate


def _abort(client: Any, name: str) -> None:
    try:
        client.Abort(v1.AbortRequest(request_id=name))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:  # the stream was quicker
            raise


def test_64_streams_with_cancels_deadlines_and_killed_clients_leak_nothing(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "tiny")
    expected = [(prompt, greedy(model, prompt)) for prompt in prompts()]
    # A pool of some 80 pages and 32 running: streams queue, and are preempted.
    with serving(tmp_path / "tiny", max_running=32, kv_cache_memory=2**20) as live:
        command = [sys.executable, "-c", CLIENT, live.address]
        doomed = [
            subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
            for _ in range(N_PROCESSES)
        ]
        with ThreadPoolExecutor(N_THREADS) as threads:
            clients = [threads.submit(one_client, live, random.Random(seed), expected) for seed in range(N_THREADS * 2)]
            for process in doomed:
                assert process.stdout is not None
                assert process.stdout.readline() == "streaming\n"
            time.sleep(0.3)
            for process in doomed:
                process.kill()
                process.communicate()
            fates = [client.result(120) for client in clients]
        assert set(fates) == {"finish", "cancel", "deadline", "abort", "vanish"}
        assert eventually(live.is_clean, seconds=5), live.server.desk.names
        with stub(live.address) as client:
            for prompt, answer in expected:
                assert tokens_of(list(client.Generate(asking(prompt, max_tokens=N_TOKENS)))) == answer
        assert eventually(live.is_clean)
