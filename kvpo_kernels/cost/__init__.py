"""What a training iteration costs, by count: memory, operations, bytes and time."""
