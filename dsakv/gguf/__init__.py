"""GGUF files of Llama models: what their header tells, the config and the tokenizer in it. No torch."""
