"""Model families, and what they ask of a KV cache."""
