"""dsakv: run DeepSeek Sparse Attention models, record what they select, decide where the KV cache may live."""

__version__ = "0.1.0"
