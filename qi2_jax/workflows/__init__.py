"""Several tasks in a row: the demo, the curriculum, export, and the comparison with PyTorch."""
