"""The Lumos-1 model in plain PyTorch: layouts, MM-RoPE, attention, AR-DF, sampling, tokenizers, checkpoints."""
