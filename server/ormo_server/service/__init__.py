"""The gRPC shell round the core: the engine that owns the lock, and thin servicers that translate."""
