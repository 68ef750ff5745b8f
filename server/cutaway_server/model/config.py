"""The shape of a transformer (moved to cutaway_server.architecture)."""

from cutaway_server.architecture import LayerConfig, ModelConfig, Rope, RopeScaling

__all__ = ["LayerConfig", "ModelConfig", "Rope", "RopeScaling"]
