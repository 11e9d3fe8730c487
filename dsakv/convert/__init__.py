"""A Hugging Face checkpoint as one safetensors file a rank, with DeepSeek's names, streamed and verified. No torch.

``source`` checks what is there against the architecture; ``plan`` lays out the output files, any stretch of which it
computes from the source. Writing, resuming and verifying all go over the same pieces.
"""
