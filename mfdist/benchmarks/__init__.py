"""Measurements of mfdist on the machine at hand, beside what a user would call instead.

Nothing wrong is timed: each contender's result is compared with float64 first. Rates are told as shares of what the
memory did in the same run, because machines differ and are shared.
"""
