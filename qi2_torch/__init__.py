"""The PyTorch side of exchange: runs the published code on an exported folder, in a separate process.

Only this package imports torch and diffusers, and no other package imports it.
"""
