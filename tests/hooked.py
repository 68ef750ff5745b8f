"""Every point's value as transformers computes it: read by hooks on its modules, in fp32 and eager attention."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as rope_source

A, M = "blocks.{}.attn.", "blocks.{}.mlp."


class Hooked:
    """The values of one prompt, by canonical name; [pos, ...] or [head, q_pos, k_pos]."""

    def __init__(self, model: transformers.PreTrainedModel, ids: list[int]) -> None:
        self.values: dict[str, Tensor] = {}
        self.model, self.config = model, model.config
        self.gpt2 = model.config.model_type == "gpt2"
        inner = model.transformer if self.gpt2 else model.model
        self.blocks = inner.h if self.gpt2 else inner.layers
        self._seen: defaultdict[nn.Module, dict[str, Any]] = defaultdict(dict)
        handles = [module.register_forward_hook(self._note) for module in model.modules()]
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            self._whole(inner, out)
            for i, block in enumerate(self.blocks):
                self._block(i, block, out)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._seen[module] = {"in": inputs[0] if inputs else None, "out": output}

    def _in(self, module: nn.Module) -> Tensor:
        return self._seen[module]["in"][0]

    def _out(self, module: nn.Module) -> Tensor:
        out = self._seen[module]["out"]
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _whole(self, inner: nn.Module, out: Any) -> None:
        put = self.values.__setitem__
        if self.gpt2:
            put("hook_embed", self._out(inner.wte))
            put("hook_pos_embed", self._out(inner.wpe))
        else:
            put(
                "hook_embed",
                self._in(self.blocks[0]) if self._seen[self.blocks[0]]["in"] is not None else out.hidden_states[0][0],
            )
        final = inner.ln_f if self.gpt2 else inner.norm
        self._norm("ln_final", final)
        put("ln_final.hook_out", self._out(final))
        put("logits", out.logits[0])

    def _norm(self, name: str, module: nn.Module) -> None:
        x = self._in(module)
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        self.values[f"{name}.hook_scale"] = scale
        self.values[f"{name}.hook_normalized"] = self._out(module) if isinstance(module, nn.LayerNorm) else x / scale

    def _block(self, i: int, block: nn.Module, out: Any) -> None:
        put = lambda name, value: self.values.__setitem__(name.format(i), value)  # noqa: E731
        attention = block.attn if self.gpt2 else block.self_attn
        kind = self.config.model_type
        pre, put_pre = out.hidden_states[i][0], "blocks.{}.hook_resid_pre"
        put(put_pre, pre)
        if self.gpt2:
            norms = {"ln1": block.ln_1, "ln2": block.ln_2}
        elif kind == "olmo2":
            norms = {"ln1_post": block.post_attention_layernorm, "ln2_post": block.post_feedforward_layernorm}
        elif kind.startswith("gemma"):
            norms = {
                "ln1": block.input_layernorm, "ln1_post": block.post_attention_layernorm,
                "ln2": block.pre_feedforward_layernorm, "ln2_post": block.post_feedforward_layernorm,
            }  # fmt: skip
        else:
            norms = {"ln1": block.input_layernorm, "ln2": block.post_attention_layernorm}
        for name, module in norms.items():
            self._norm(f"blocks.{i}.{name}", module)
        attn_out = self._out(norms["ln1_post"]) if "ln1_post" in norms else self._out(attention)
        mlp_out = self._out(norms["ln2_post"]) if "ln2_post" in norms else self._out(block.mlp)
        put("blocks.{}.hook_attn_out", attn_out)
        put("blocks.{}.hook_resid_mid", pre + attn_out)
        put("blocks.{}.hook_mlp_out", mlp_out)
        put("blocks.{}.hook_resid_post", pre + attn_out + mlp_out)
        self._attention(i, attention, out.attentions[i][0], put)
        self._mlp(block.mlp, put)

    def _attention(self, i: int, attention: nn.Module, pattern: Tensor, put: Any) -> None:
        config = self.config
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        if self.gpt2:
            q, k, v = self._out(attention.c_attn).split(config.hidden_size, -1)
            output, weight = attention.c_proj, attention.c_proj.weight.T
        else:
            if hasattr(attention, "qkv_proj"):
                q, k, v = self._out(attention.qkv_proj).split([heads * width, kv * width, kv * width], -1)
            else:
                q, k, v = (self._out(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
            output = attention.o_proj
            weight = output.weight
        shaped = [x.unflatten(-1, (-1, width)) for x in (q, k, v)]
        for name, x in zip(("hook_q", "hook_k", "hook_v"), shaped, strict=True):
            put(A + name, x)
        rot_q, rot_k = (
            self._turned(i, attention, x, name) for x, name in zip(shaped, ("q_norm", "k_norm"), strict=False)
        )
        put(A + "hook_rot_q", rot_q)
        put(A + "hook_rot_k", rot_k)
        put(A + "hook_pattern", pattern)
        z = self._in(output).unflatten(-1, (heads, width))
        put(A + "hook_z", z)
        by_head = weight.unflatten(-1, (heads, width))
        put(A + "hook_result", torch.einsum("phd,mhd->phm", z, by_head))
        scale = width**-0.5
        if getattr(config, "query_pre_attn_scalar", None):
            scale = config.query_pre_attn_scalar**-0.5
        keys = rot_k.repeat_interleave(heads // kv, 1)
        scores = torch.einsum("qhd,khd->hqk", rot_q, keys) * scale
        if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(pattern == 0, -torch.inf)  # where transformers masks, its probability is exactly 0
        put(A + "hook_attn_scores", scores)
        put(A + "hook_lse", scores.logsumexp(-1).T)

    def _turned(self, i: int, attention: nn.Module, x: Tensor, norm: str) -> Tensor:
        if hasattr(attention, norm):
            normed = self._out(getattr(attention, norm))
            by_head = normed.ndim == 3 and normed.shape[:2] == (x.shape[1], x.shape[0])  # Gemma 3: heads first
            x = normed.transpose(0, 1) if by_head else normed.reshape(x.shape)
        if self.gpt2:
            return x
        positions = torch.arange(len(x))[None]
        rotary = self.model.model.rotary_emb
        if self.config.model_type.startswith("gemma3"):
            cos, sin = rotary(x[None], positions, self.config.layer_types[i])
        else:
            cos, sin = rotary(x[None], positions)
        dims = cos.shape[-1]
        turned, rest = x[..., :dims], x[..., dims:]
        turned, _ = rope_source.apply_rotary_pos_emb(turned[None], turned[None], cos, sin, unsqueeze_dim=2)
        return torch.cat([turned[0], rest], -1)

    def _mlp(self, mlp: nn.Module, put: Any) -> None:
        if self.gpt2:
            put(M + "hook_pre", self._out(mlp.c_fc))
            put(M + "hook_post", self._in(mlp.c_proj))
            return
        if hasattr(mlp, "gate_up_proj"):
            gate, up = self._out(mlp.gate_up_proj).chunk(2, -1)
        else:
            gate, up = self._out(mlp.gate_proj), self._out(mlp.up_proj)
        put(M + "hook_pre", gate)
        put(M + "hook_pre_linear", up)
        put(M + "hook_post", self._in(mlp.down_proj))
