"""Several tasks in a row: the demo, the curriculum, export, and the comparison with diffusers.

Workflows print nothing. They log what they do, and pass tables to a `Show` function of the command line.
"""
