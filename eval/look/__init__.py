"""Looking inside a checkpoint: what it saw, what it knows, where it fails; `python -m eval.look`."""
