"""The page of a run, and the one that compares runs: `python -m eval.report runs/<run> ...`."""
