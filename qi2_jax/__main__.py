"""Runs the command line: `python -m qi2_jax VERB` equals `qi2 VERB`."""

from qi2_jax.cli.main import main

if __name__ == "__main__":
    main()
