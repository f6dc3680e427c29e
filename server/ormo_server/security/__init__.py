"""Who may do what: TLS, the list of callers, and their roles. `service/interceptors.py` goes by it at every call."""
