"""The command line: one file per verb. Only this package uses argparse and rich."""
