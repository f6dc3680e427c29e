"""`ormo-local`: a server, workers and an evaluator as processes of this machine, for a first try and for development.

It knows the others only by their command lines and the server by its `GetStatus`, as any operator does.
"""
