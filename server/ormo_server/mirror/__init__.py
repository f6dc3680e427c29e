"""Copies of a run's checkpoints in a bucket, or in a folder elsewhere, for when the disk is gone.

address/
    lease.json                          who writes here, and what it last had; see `lease.py`
    20261129-091055-3f2a9c/             of one writer: one `--directory`, on one disk
        checkpoint-00000007-iteration-1200/     as on the disk; SHA256SUMS comes last, so without it one is not whole
"""
