"""64 streams at once, cancelled, timed out and killed at random: nothing leaks, and what is answered is right."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch
from cutaway.v1 import inference_pb2 as v1
from serving import LiveServer, asking, eventually, serving, stub, tokens_of
from tiny import save_tiny

N_TOKENS = 48
N_THREADS, N_PROCESSES, STREAMS_EACH = 48, 4, 4
FATES = ("finish", "cancel", "deadline", "abort", "vanish")
EXPECTED = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}
# A client program that streams, again and again, until it is killed; it says so once a stream has begun.
CLIENT = f"""
import sys, threading, grpc
from cutaway.v1 import inference_pb2 as v1
from cutaway.v1.inference_pb2_grpc import InferenceStub
begun = threading.Semaphore(0)
asked = v1.GenerateRequest(token_ids=v1.TokenIds(ids=range(40, 100)), sampling=v1.SamplingParams(n=2, ignore_eos=True))
def stream(client):
    while True:
        for _ in client.Generate(asked): begun.release()
client = InferenceStub(grpc.insecure_channel(sys.argv[1]))
threads = [threading.Thread(target=stream, args=(client,), daemon=True) for _ in range({STREAMS_EACH})]
for thread in threads: thread.start()
begun.acquire()
print("streaming", flush=True)
for thread in threads: thread.join()
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


def one_client(live: LiveServer, fate: str, chance: random.Random, expected: list[tuple[list[int], list[int]]]) -> int:
    """Stream something, to the end or not; the number of tokens that came."""
    prompt, answer = chance.choice(expected)
    wanted = N_TOKENS if fate == "finish" else 512 - len(prompt)  # too many to be done before it is ended
    name = f"client-{chance.randrange(10**9)}"
    with stub(live.address) as client:
        timeout = chance.uniform(0.02, 1.5) if fate == "deadline" else None
        call = client.Generate(asking(prompt, max_tokens=wanted, ask_request_id=name), timeout=timeout)
        received: list[Any] = []
        patience = chance.randrange(0, N_TOKENS // 2)
        try:
            for response in call:
                received.append(response)
                if len(received) > patience and fate == "cancel":
                    call.cancel()
                elif len(received) > patience and fate == "vanish":
                    return len(tokens_of(received))  # the channel is closed under the stream
                elif len(received) == patience and fate == "abort":
                    _abort(client, name)
        except grpc.RpcError as error:
            if error.code() is not EXPECTED.get(fate):
                raise
        tokens = tokens_of(received)
        assert tokens[:N_TOKENS] == answer[: len(tokens)], "whatever is streamed is right"
        assert fate != "finish" or len(tokens) == N_TOKENS
    return len(tokens)


@contextmanager
def doomed_clients(live: LiveServer) -> Iterator[list[subprocess.Popen[str]]]:
    """Client programs at work."""
    command = [sys.executable, "-c", CLIENT, live.address]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(N_PROCESSES)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "streaming\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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
    with serving(tmp_path / "tiny", max_running=32, kv_cache_memory=2**20, pace=0.002) as live:
        with doomed_clients(live) as doomed, ThreadPoolExecutor(N_THREADS) as threads:
            clients = [
                threads.submit(one_client, live, FATES[seed % len(FATES)], random.Random(seed), expected)
                for seed in range(N_THREADS)
            ]
            assert eventually(lambda: len(live.server.desk.names) > N_THREADS), "all are at it together"
            for process in doomed:
                time.sleep(0.2)
                assert process.poll() is None, "it is still streaming"
                process.kill()
            n_tokens = [client.result(120) for client in clients]
        assert sum(0 < n < 400 and n != N_TOKENS for n in n_tokens) > 10, "many were ended in their middle"
        assert eventually(live.is_clean, seconds=3), "what nobody reads is not computed"
        with stub(live.address) as client:
            for prompt, answer in expected:
                assert tokens_of(list(client.Generate(asking(prompt, max_tokens=N_TOKENS)))) == answer
        assert eventually(live.is_clean)
