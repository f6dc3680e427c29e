"""The wire contract `ormo.v1`: protos, generated code, the model's manifest and the tensor codec."""
