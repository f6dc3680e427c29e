"""Real processes under load, faults from a seed, and a proof afterwards: `python -m chaos` in folder tests.

A run leaves evidence behind: what each worker tried and what it was told (`loads`), and every checkpoint and file of
the journal that the server ever wrote (`archive`). `evidence` reads it, doing again all that the journal says;
`checker` says what is wrong with it.
"""
