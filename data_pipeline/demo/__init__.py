"""The demo data set: photographs from installed packages, drawn signs and cut-outs."""
