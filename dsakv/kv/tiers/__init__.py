"""Where blocks of the KV cache live when they do not live on the device."""
