"""Compiles every Triton kernel for an H200 (sm_90) on a machine without a GPU, and prints what each would use.

Run as a program: the operations are called on CPU tensors with a driver that knows a target and launches nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())

import torch
import triton
from cutaway_server.architecture import LayerConfig, ModelConfig, Rope
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.cuda.operations import CudaKernels
from networks import flat, random_weights
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

LLAMA = ModelConfig(
    family="llama", d_model=4096, n_heads=32, n_kv_heads=8, d_head=128, d_mlp=1024, d_vocab=256, max_context=1024,
    layers=(LayerConfig(None, Rope(5e5, 128)),),
)  # fmt: skip
SMOLLM2 = replace(LLAMA, d_model=576, n_heads=9, n_kv_heads=3, d_head=64, layers=(LayerConfig(None, Rope(1e5, 64)),))
GEMMA = replace(
    LLAMA, d_model=2304, n_heads=8, n_kv_heads=4, d_head=256, attention_softcap=50.0, logit_softcap=30.0,
    post_norm=True, activation="gelu_tanh", layers=(LayerConfig(4096, Rope(1e4, 256)),),
)  # fmt: skip
QWEN3 = replace(LLAMA, d_model=1024, n_heads=16, qk_norm="head", layers=(LayerConfig(None, Rope(1e6, 128)),))
OLMO2 = replace(LLAMA, d_model=2048, n_heads=16, n_kv_heads=16, qk_norm="full", pre_norm=False, post_norm=True)
GPT2 = replace(
    LLAMA, d_model=768, n_heads=12, n_kv_heads=12, d_head=64, norm="layer", gated=False, activation="gelu",
    learned_positions=True, layers=(LayerConfig(),),
)  # fmt: skip


class Target:
    """A driver that knows what to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def resources(kernel: object) -> tuple[int, int]:
    """Registers a thread and bytes spilled to local memory of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])  # type: ignore[attr-defined]
        cubin.flush()
        told = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    assert found, told.stdout
    return int(found[1]), int(found[2])


def watch(name: str) -> None:
    """Compile instead of launching, and print each kernel once."""
    seen: set[str] = set()

    def compiled(self: JITFunction, grid: object) -> object:
        def launch(*args: object, **options: object) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                registers, stack = resources(kernel)
                shared = kernel.metadata.shared
                print(f"{name:24} {self.__name__:18} {registers:4} registers {stack:5} spilled {shared:7} shared")
                sys.stdout.flush()
                assert shared <= 227 * 1024, "an H200 has no more"

        return launch

    KernelInterface.__getitem__ = compiled  # type: ignore[method-assign, assignment]


def walk(config: ModelConfig, dtype: torch.dtype, kv: torch.dtype | None = None, *, invariant: bool = False) -> None:
    """Call every operation, fused and open, on a batch of a prompt and a decode."""
    kernels = CudaKernels(config, random_weights(config, dtype=dtype), 1024, batch_invariant=invariant)
    shape = (1, 8, config.n_kv_heads, 16, config.d_head)
    keys = torch.zeros(shape, dtype=kv or dtype)
    scales = torch.ones(shape[:-1]) if kv is not None else None
    pages = Pages(keys, keys.clone(), scales, scales)
    prompt = [(list(range(70)), 0, 70, [1, 2, 3, 4, 5]), ([1, 2, 3], 2, 3, [6])]
    plan = kernels.plan(flat(prompt, 16))
    residual = kernels.embed(plan)
    kernels.unembed(kernels.layers(0, 1, residual, plan, pages))
    opened = kernels.open_attention_input(0, residual, plan)
    kernels.open_attention_output(0, opened.rot_q, residual)
    kernels.open_mlp_output(0, kernels.open_mlp_input(0, residual).post, residual)
    kernels.mlp_output(0, kernels.mlp_input(0, residual), residual)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Target())
    bf16 = torch.bfloat16
    for name, arguments, options in (
        ("llama bf16", (LLAMA, bf16), {}),
        ("llama fp16", (LLAMA, torch.float16), {}),
        ("llama fp32", (LLAMA, torch.float32), {}),
        ("llama bf16, fp8 kv", (LLAMA, bf16, torch.float8_e4m3fn), {}),
        ("llama bf16, int8 kv", (LLAMA, bf16, torch.int8), {}),
        ("llama bf16 invariant", (LLAMA, bf16), {"invariant": True}),
        ("smollm2 bf16", (SMOLLM2, bf16), {}),
        ("gemma bf16", (GEMMA, bf16), {}),
        ("gemma fp32", (GEMMA, torch.float32), {}),
        ("qwen3 bf16", (QWEN3, bf16), {}),
        ("olmo2 bf16", (OLMO2, bf16), {}),
        ("gpt2 bf16", (GPT2, bf16), {}),
    ):
        watch(name)
        walk(*arguments, **options)  # type: ignore[arg-type]
