"""Training: batch plan, ingest, the step, the workers, the run; and the tokenizers' own training."""
