"""Generating videos from a trained model: one prompt, a file of prompts, or over HTTP."""

import os

# Read when torch is loaded, which the modules here do. Threads that wait by spinning take the cores from the very
# threads they wait for as soon as anything else runs on the machine; a batch took 10 to 50 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
