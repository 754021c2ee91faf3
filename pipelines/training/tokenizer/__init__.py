"""Training and measuring tokenizers: the causal FSQ video tokenizer and the small text tokenizer."""
