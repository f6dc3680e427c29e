"""How fast tensors travel, next to what one would use instead: `python -m benchmarks.round_trips` in folder tests."""
