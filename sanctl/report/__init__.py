"""Everything that prints or draws: the terminal, logs, metrics.csv, TensorBoard, plots."""
