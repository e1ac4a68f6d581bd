"""The layout of run, job and model folders, and locating the model in a path."""
