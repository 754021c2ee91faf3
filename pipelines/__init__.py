"""The pipelines around the model library: data, training, generation, evaluation, the demo."""
