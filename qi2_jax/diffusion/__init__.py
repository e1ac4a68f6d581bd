"""Flow matching: path and loss, timestep distributions, resolution shift, schedule, noise and sampler.

Time runs from t = 1 (noise) to t = 0 (data), everywhere.
"""
