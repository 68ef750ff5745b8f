"""A real gRPC server whose answers are written by the test: tokens, errors, delays; it sees cancels.

It stands in for a model, not for the network: the client under test cannot tell it from Cutaway's own server.
"""

# ruff: noqa: N802 (the generated base class names the methods)

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from cutaway.v1 import inference_pb2 as pb
from cutaway.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

Script = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]


def started(request: pb.GenerateRequest, **values: object) -> pb.GenerateResponse:
    name = request.request_id or "picked"
    told = pb.Started(prompt_tokens=3, cached_tokens=1, model_hash="abc", kernels="reference", dtype="F32", seed=7)
    told.MergeFrom(pb.Started(request_id=name, **values))
    return pb.GenerateResponse(started=told)


def delta(*tokens: pb.Token, index: int = 0) -> pb.GenerateResponse:
    text = "".join(token.text for token in tokens)
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, tokens=tokens))


def finished(*completions: pb.Completion, tokens: int = 3) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        finished=pb.Finished(
            completions=completions
            or [pb.Completion(index=0, finish_reason="FINISH_REASON_STOP", completion_tokens=3)],
            usage=pb.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=tokens),
            timings=pb.Timings(queue_seconds=0.5, prefill_seconds=0.25, decode_seconds=0.125, preemptions=2),
        )
    )


def hello(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    """Three tokens, two of them in one delta, as a slow reader gets them."""
    yield started(request)
    yield delta(pb.Token(id=5, text="Hel", step=11, logprob=-0.5, top_logprobs=[pb.TopLogprob(id=5, logprob=-0.5)]))
    yield delta(pb.Token(id=6, text="lo ", step=12), pb.Token(id=7, text="wörld", step=13))
    yield finished()


class Scripted(InferenceServicer):
    """Plays `script` for every Generate; notes what was asked, and when a call was cancelled."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[object] = []
        self.cancelled = threading.Event()  # `endless` or `silent`, which never end of themselves, were ended

    def endless(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        """A token every 5 ms until the client goes away."""
        context.add_callback(self.cancelled.set)
        yield started(request)
        for step in itertools.count(1):
            yield delta(pb.Token(id=1, text="x", step=step))
            time.sleep(0.005)

    def silent(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        """A request that waits in the queue: nothing comes until the client goes away."""
        context.add_callback(self.cancelled.set)
        self.cancelled.wait(10)
        yield from ()

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        return self.script(request, context)

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        self.asked.append(request)
        if request.request_id == "unlucky":
            context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
        context.abort(grpc.StatusCode.NOT_FOUND, f"request_id: {request.request_id!r} is not running")

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        self.asked.append(request)
        merges = [
            pb.WordMerges(
                symbols=["l", "o", "w"],
                steps=[
                    pb.Merge(left="l", right="o", rank=4, position=0),
                    pb.Merge(left="lo", right="w", rank=9, position=0),
                ],
            )
        ]
        return pb.TokenizeResponse(
            ids=[3, 4],
            pieces=["low", "Ġest"],
            byte_starts=[0, 3],
            byte_ends=[3, 7],
            merges=merges if request.merges else [],
            rendered="<laid out>" if request.HasField("chat") else "",
        )

    def Detokenize(self, request: pb.DetokenizeRequest, context: grpc.ServicerContext) -> pb.DetokenizeResponse:
        self.asked.append(request)
        return pb.DetokenizeResponse(text="hé", token_bytes=[b"h", b"\xc3\xa9"])

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        self.asked.append(request)
        return pb.GetModelResponse(
            name="tiny",
            model_hash="abc",
            server_version="9.9",
            kernels="reference",
            dtype="F32",
            device="cpu",
            architecture=pb.Architecture(family="llama", n_layers=2, d_model=8, n_parameters=123, windows=[0, 16]),
            limits=pb.Limits(max_context=64, page_size=16, total_pages=8),
            text=pb.TextInfo(eos_token_ids=[2], chat_template="{{ messages }}"),
            default_sampling=pb.SamplingParams(temperature=0.6, stop=["\n"], logit_bias={3: -1.0}),
        )


def serve(servicer: Scripted, address: str = "127.0.0.1:0") -> tuple[grpc.Server, str]:
    """Start a server; the address says which port it got."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    server.start()
    return server, f"127.0.0.1:{port}"
