"""An LLM inference server you can see into."""
