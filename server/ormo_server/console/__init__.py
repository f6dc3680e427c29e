"""`ormo-server status` and `ormo-server top`: what people see of a run, from `GetStatus` alone and without PyTorch."""
