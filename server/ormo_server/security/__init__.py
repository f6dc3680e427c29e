"""Who may do what: TLS, the list of callers, and their roles. `service/guard.py` goes by it at every call."""
