"""Where panels turn orange or red: the values at which the alerts of deploy/prometheus fire. A test compares them."""

# Of the 99th percentile of the delay, as a multiple of K.
RELATIVE_DELAY = 16.0
# Shares of a whole.
LOCK_HELD = 0.9
MEMORY_USED = 0.9
REFUSED_PUSHES = 0.05
NON_FINITE_GRADIENTS = 0.001
# Since a worker's last push; the alert asks besides that it be out of proportion to the worker's usual time.
LAST_PUSH_SECONDS = 120.0
# Of work that no checkpoint holds, as a multiple of the interval between checkpoints: after failures, and in any case.
UNSAVED_INTERVALS_AFTER_FAILURE = 1.5
UNSAVED_INTERVALS = 5.0
# Of a checkpoint that is not in the mirror, beside so many intervals between checkpoints.
MIRROR_BEHIND_SECONDS = 300.0
MIRROR_BEHIND_INTERVALS = 5.0
# Starts of the server within half an hour.
RESTARTS = 3.0
