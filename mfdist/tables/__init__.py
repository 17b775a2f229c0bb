"""Tables by where their rows lie."""
