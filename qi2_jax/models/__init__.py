"""Pure modules: no mesh names, no files, no randomness beyond initialisation."""
