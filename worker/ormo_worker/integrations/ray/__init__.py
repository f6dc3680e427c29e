"""`ormo-ray`: workers, and maybe the server, as actors of a Ray cluster."""
