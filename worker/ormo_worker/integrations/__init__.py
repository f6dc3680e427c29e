"""What makes other libraries and launchers work with a parameter server; each is imported only by those who use it."""
