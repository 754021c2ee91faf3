"""Generating videos from a trained model: one prompt, a file of prompts, or over HTTP, all through Ray Serve."""
