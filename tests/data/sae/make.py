"""Makes the autoencoders beside this file, and what SAELens encodes with them: run with sae-lens 6.54 installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import (  # type: ignore[import-not-found]
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata  # type: ignore[import-not-found]
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_SAE = 16, 24
RESID, Z = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "layer_norm": (
        StandardSAE, StandardSAEConfig, {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}
    ),
    "rescaled_norm": (StandardSAE, StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 4}),
    "topk_rescaled": (TopKSAE, TopKSAEConfig, {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {"normalize_activations": "expected_average_only_in"}),
    "hook_z": (StandardSAE, StandardSAEConfig, {"reshape_activations": "hook_z"}),
}  # fmt: skip
LEGACY = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": "tiny", "hook_point": RESID,
    "hook_point_layer": 1, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3},
    "normalize_activations": False,
}  # fmt: skip


def main() -> None:
    """Write every directory, and expected.safetensors: the inputs, and the features of each."""
    torch.manual_seed(0)
    expected = {"x": 2 * torch.randn(6, D_IN)}
    for name, (kind, config, fields) in CASES.items():
        metadata = SAEMetadata(model_name="tiny", hook_name=Z if name == "hook_z" else RESID)
        sae = kind(config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **fields))
        for parameter in sae.parameters():
            parameter.data = torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 0.3)
        if name == "jumprelu":
            sae.threshold.data = sae.threshold.data.abs()
        sae.save_model(HERE / name)
    legacy = HERE / "legacy_topk"
    legacy.mkdir(exist_ok=True)
    sae = SAE.load_from_disk(HERE / "standard")
    save_file({key: value.contiguous() for key, value in sae.state_dict().items()}, legacy / "sae_weights.safetensors")
    (legacy / "cfg.json").write_text(json.dumps(LEGACY))
    for name in [*CASES, "legacy_topk"]:
        sae = SAE.load_from_disk(HERE / name)
        with torch.no_grad():
            expected[name] = sae.encode(expected["x"].unflatten(-1, (4, 4)) if name == "hook_z" else expected["x"])
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
