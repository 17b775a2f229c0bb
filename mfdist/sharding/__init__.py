"""Splitting tables over ranks: plans, what they cost, what chooses them, and the exchanges that carry them out."""
