"""Version 1 of the contract. `parameter_server.proto` documents it; the modules here are generated from it."""

PROTOCOL_VERSION = 1
