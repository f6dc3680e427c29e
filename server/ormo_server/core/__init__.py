"""The algorithm, pure: no gRPC, sockets, clocks, locks, files, logging or metrics. Time and randomness are arguments.

The same state and the same inputs give the same state and the same outcomes, bit for bit, on the same torch build and
CPU capability: the service, the simulator and the journal's replay all drive this one machine.
"""
