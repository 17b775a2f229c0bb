"""Addressing: from activations to row ids and scores."""
