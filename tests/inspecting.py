"""Calls of Introspection as they cross the wire: bytes of each message, rows and bytes of what is captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from cutaway.v1 import capture_pb2, edit_pb2, introspection_pb2
from cutaway.v1 import inference_pb2 as v1
from google.protobuf.message_factory import GetMessageClass
from serving import asking

SERVICE = introspection_pb2.DESCRIPTOR.services_by_name["Introspection"]


@dataclass
class Seen:
    """What clients saw, by the name of the RPC; of captures whichever call made them."""

    begun: Counter[str] = field(default_factory=Counter)
    asked_bytes: Counter[str] = field(default_factory=Counter)
    answered_bytes: Counter[str] = field(default_factory=Counter)
    captured_rows: int = 0
    captured_bytes: int = 0
    usages: list[v1.Usage] = field(default_factory=list)

    def take(self, events: Iterable[v1.GenerateResponse]) -> list[v1.GenerateResponse]:
        """Count the captures among a stream's events."""
        taken, rows = list(events), {}
        for event in taken:
            match event.WhichOneof("event"):
                case "tensor":
                    told = event.tensor
                    self.captured_bytes += told.bytes
                    which = (told.capture, told.step, told.index if told.HasField("index") else None)
                    rows[which] = next(axis.size for axis in told.axes if axis.name in ("pos", "q_pos"))
                case "finished":
                    self.usages.append(event.finished.usage)
        self.captured_rows += sum(rows.values())
        return taken

    def call(self, channel: grpc.Channel, rpc: str, request: Any = None, *metadata: tuple[str, str]) -> list[Any]:
        """Make a call to its end. Raises grpc.RpcError; what came before that is counted."""
        method = SERVICE.methods_by_name[rpc]
        asked = GetMessageClass(method.input_type)() if request is None else request
        data, answer = asked.SerializeToString(), GetMessageClass(method.output_type)

        def arrived(message: bytes) -> Any:
            self.answered_bytes[rpc] += len(message)
            return answer.FromString(message)

        self.begun[rpc] += 1
        self.asked_bytes[rpc] += len(data)
        path = f"/{SERVICE.full_name}/{rpc}"
        if not method.server_streaming:
            unary = channel.unary_unary(path, response_deserializer=arrived)
            return [unary(data, metadata=metadata, timeout=20)]
        messages = list(channel.unary_stream(path, response_deserializer=arrived)(data, metadata=metadata, timeout=20))
        if "event" in answer.DESCRIPTOR.fields_by_name:
            self.take(message.event for message in messages)
        return messages


def looking(prompt: list[int], *captures: capture_pb2.Capture, edits: Any = (), **options: Any) -> v1.GenerateRequest:
    """A request with captures and edits."""
    asked = asking(prompt, **options)
    asked.captures.extend(captures)
    asked.edits.extend(edits)
    return asked


def capture(point: str, **fields: Any) -> capture_pb2.Capture:
    return capture_pb2.Capture(point=point, **fields)


def doubled(point: str, *positions: int) -> edit_pb2.Edit:
    """An edit that doubles a point's values."""
    where = capture_pb2.Positions(list=positions)
    return edit_pb2.Edit(point=point, positions=where, scale=edit_pb2.Scale(factor=2))
