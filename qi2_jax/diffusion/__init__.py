"""Flow matching as small objects that compose: path and loss, timestep laws, resolution shift, schedule, sampler.

Time runs from t = 1 (noise) to t = 0 (data), everywhere.
"""
