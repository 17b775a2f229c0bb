"""The report of a run: one HTML file that shows what it learnt, how fast, and how its tables are used."""
