"""The embedded models: their tasks, tokenizer, data and weights, and the demonstration that decodes with the models."""
