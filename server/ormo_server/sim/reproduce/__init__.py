"""Methods compared over workers, settings, learning rates and seeds: simulations, tables and pictures."""
