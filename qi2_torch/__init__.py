"""The PyTorch side of exchange: runs the published code on an exported folder, in a process of its own.

The only package of the project that imports torch and diffusers; nothing else imports it.
"""
