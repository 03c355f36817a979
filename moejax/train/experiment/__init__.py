"""An experiment: its config, its directory, its costs, and its summary in words."""
