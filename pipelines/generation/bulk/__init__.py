"""Videos for many prompts into a folder."""
