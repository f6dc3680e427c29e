"""`python -m ormo_worker` is `ormo-worker`."""

from ormo_worker.cli import program

program()
