"""A parameter server under a PyTorch training loop: the optimizer, and how tensors get to and from the wire."""
