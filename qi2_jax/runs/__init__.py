"""The layout of run, job and model folders, and finding the model that a path holds."""
