"""Introspection: who looks inside how much, what it costs those who only generate, and what is refused."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders
from panels import CHOSEN, Query, board, graph, heat, number, quantile, rate, total

CALLS, SECONDS = "cutaway_introspection_requests_total", "cutaway_introspection_request_seconds"
STEPS, STEP_SECONDS = "cutaway_introspection_steps_total", "cutaway_introspection_step_seconds_total"
ALL_SECONDS = rate("cutaway_step_duration_seconds_sum")
SHARE_OF_TIME = f"{rate(STEP_SECONDS)} / {ALL_SECONDS}"
ORANGE, RED = "orange", "red"
CHEAPER = "capture fewer points, layers or positions, or reduce on the server (top_k, norm, project, pool)"


def introspection() -> builders.Dashboard:
    """The dashboard."""
    rows = {"Now": _now(), "Calls": _calls(), "Captures": _captures(), "Steps": _steps(), "What is held": _held()}
    return board(
        "cutaway-introspection", "Cutaway: introspection cost",
        "Who looks inside how much, and what it costs those who only generate.", rows,
    )  # fmt: skip


def _now() -> list[object]:
    return [
        number(
            "Calls", "reqps", "Calls of Introspection a second. Which RPC: see below.", rate(CALLS), decimals=2,
        ),
        number(
            "Sent", "Bps", f"Bytes a second that they are answered with. More than your network carries: {CHEAPER}.",
            rate("cutaway_introspection_sent_bytes_total"), decimals=1,
        ),
        number(
            "Captured rows", "short", "Positions a second that captures read.", rate("cutaway_captured_rows_total"),
            decimals=1,
        ),
        number(
            "Time in such steps", "percentunit",
            "Share of the engine's time in steps that somebody looks into or changes. It is not lost: those steps "
            "compute others' tokens too. How much longer they take is under 'Steps'.",
            SHARE_OF_TIME, (0.5, ORANGE), (0.9, RED), decimals=1,
        ),
        number(
            "Handing captures over", "percentunit",
            f"Share of the engine's time that goes into reducing captured values and copying them to the host. High: "
            f"{CHEAPER}.",
            f"{rate('cutaway_captured_seconds_total')} / {ALL_SECONDS}", (0.1, ORANGE), (0.3, RED), decimals=1,
        ),
        number(
            "Capture memory held", "percentunit",
            "The fullest instance: what captures of requests at work may come to, of --capture-memory. Near 100 %, "
            "calls are refused (memory): raise it, or ask for less at a time.",
            _full(), (0.8, ORANGE), (0.95, RED), decimals=1,
        ),
        number(
            "Refused", "reqps", "A second, for all reasons; they are below.",
            rate("cutaway_introspection_refused_total"), (0.1, ORANGE), (1, RED), decimals=2,
        ),
        number(
            "Watches open", "short",
            "Streams of WatchSteps and WatchCache. Each is told of every step; close those that nobody reads.",
            _watches(), (20, ORANGE), (100, RED),
        ),
    ]  # fmt: skip


def _calls() -> list[object]:
    return [
        graph(
            "Calls a second", "reqps", "By RPC, those included that are refused.", Query(rate(CALLS, "rpc"), "{{rpc}}")
        ),
        graph(
            "Sent", "Bps", f"Bytes a second, by RPC. If one fills the network: {CHEAPER}.",
            Query(rate("cutaway_introspection_sent_bytes_total", "rpc"), "{{rpc}}"), stacked=True,
        ),
        graph(
            "Received", "Bps", "Bytes a second, by RPC: prompts, and the vectors of projections and edits.",
            Query(rate("cutaway_introspection_received_bytes_total", "rpc"), "{{rpc}}"), stacked=True,
        ),
        graph(
            "How long calls take", "s",
            "The mean by RPC. Trace and its kin wait in the queue like any request: compare the overview's queue time.",
            Query(f"{rate(f'{SECONDS}_sum', 'rpc')} / {rate(f'{SECONDS}_count', 'rpc')}", "{{rpc}}"),
        ),
        graph(
            "How long nearly all calls take", "s", "95 of 100 calls of any RPC end sooner; watches count as they end.",
            Query(quantile(0.95, SECONDS), "p95"), Query(quantile(0.5, SECONDS), "p50"),
        ),
        graph(
            "Bytes of an answer", "bytes", f"The mean by RPC. Much more than clients need: {CHEAPER}.",
            Query(f"{rate('cutaway_introspection_sent_bytes_total', 'rpc')} / {rate(CALLS, 'rpc')}", "{{rpc}}"),
        ),
        graph(
            "Refused a second", "reqps",
            "By reason. memory: raise --capture-memory or a tenant's limit. budget: ask for less, or raise "
            "--max-capture-bytes. denied: a key without the scope. unread: a client that reads too slowly. busy: too "
            "many requests; add instances.",
            Query(rate("cutaway_introspection_refused_total", "reason"), "{{reason}}"), stacked=True, width=12,
        ),
        heat("How long calls take, heat map", "s", "Of all RPCs. A second band is often one RPC, or watches.", SECONDS),
    ]  # fmt: skip


def _captures() -> list[object]:
    return [
        graph(
            "Rows a second", "short", "Positions that captures read, by instance. One that three read counts thrice.",
            Query(rate("cutaway_captured_rows_total", "instance"), "{{instance}}"),
        ),
        graph(
            "Captured bytes a second", "Bps", "Of tensors, by instance, whichever call asked.",
            Query(rate("cutaway_captured_bytes_total", "instance"), "{{instance}}"),
        ),
        graph(
            "Bytes of a row", "bytes", f"The mean, of all layers together. Much more than is looked at: {CHEAPER}.",
            Query(f"{rate('cutaway_captured_bytes_total')} / {rate('cutaway_captured_rows_total')}", "bytes"),
        ),
    ]  # fmt: skip


def _steps() -> list[object]:
    looked, plain = f"{rate(STEP_SECONDS)} / {rate(STEPS)}", rate("cutaway_steps_total")
    others = f"({ALL_SECONDS} - {rate(STEP_SECONDS)}) / ({plain} - {rate(STEPS)})"
    return [
        graph(
            "Steps that somebody looks into", "short", "A second: with captures, with edits, with both; and all steps.",
            Query(rate(STEPS, "what"), "{{what}}"), Query(plain, "all steps"),
        ),
        graph(
            "How long a step takes", "s",
            "The mean of steps that are looked into or changed, and of the others. All requests of a step wait for it: "
            "if the gap hurts, send introspection to an instance of its own, or lower its callers' share.",
            Query(looked, "looked into"), Query(others, "others"),
        ),
        graph(
            "Share of the engine's time", "percentunit",
            "In steps that are looked into, and of that in reducing captures and copying them to the host.",
            Query(SHARE_OF_TIME, "looked into"),
            Query(f"{rate('cutaway_captured_seconds_total')} / {ALL_SECONDS}", "handing over"), most=1,
        ),
    ]  # fmt: skip


def _held() -> list[object]:
    return [
        graph(
            "Capture memory", "bytes",
            "What --capture-memory allows: held for requests at work, and free. No room: calls are refused (memory).",
            Query(total("cutaway_capture_memory_bytes", "state"), "{{state}}"), stacked=True,
        ),
        graph(
            "Kept finished requests", "bytes",
            "Blocks kept for ReadCache, evicted after all others. Less than --retain-bytes allows: the cache is short "
            "of room.",
            Query(total("cutaway_retained_bytes", "instance"), "{{instance}}"),
        ),
        graph(
            "Finished requests kept", "short", "Each until --retain-seconds have passed, or newer ones take its room.",
            Query(total("cutaway_retained_requests", "instance"), "{{instance}}"),
        ),
    ]  # fmt: skip


def _full() -> str:
    held = f'sum by (instance) (cutaway_capture_memory_bytes{{{CHOSEN},state="held"}})'
    return f"max({held} / sum by (instance) (cutaway_capture_memory_bytes{{{CHOSEN}}}))"


def _watches() -> str:
    return f'sum(cutaway_grpc_streams_open{{{CHOSEN},method=~".*/Watch(Steps|Cache)"}})'
