"""The command line, one file per verb. No other package uses argparse or rich."""
