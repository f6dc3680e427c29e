"""What others' libraries need besides the optimizer: one module for each, which imports it and is imported for it."""
