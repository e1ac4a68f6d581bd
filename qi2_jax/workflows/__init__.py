"""Several tasks in a row: the demo, the curriculum, export, and the comparison with diffusers.

Workflows print nothing. They log what they do, and hand reports to a `Show` function that the command line passes in.
"""
