"""Training and testing: the loop, its steps, its state and its files."""
