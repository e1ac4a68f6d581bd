"""One trainer for every task: state and step, the loop, checkpoints, metrics."""
