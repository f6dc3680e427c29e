"""Training in virtual time: the same core as the server's, under simulated workers on one machine."""
