"""Public operations: one module per op."""
