"""The Lumos-1 model in plain PyTorch: layout, MM-RoPE, block-causal attention, AR-DF, sampling, tokenizers, checkpoints."""
