"""From text to batches: documents, tokenizers, the token store, the order of the batches and n-gram baselines."""
