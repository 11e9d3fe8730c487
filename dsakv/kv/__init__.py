"""KV cache in blocks behind block tables."""
