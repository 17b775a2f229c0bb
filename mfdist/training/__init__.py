"""Training: text, tokens, the loop, evaluation and generation."""
