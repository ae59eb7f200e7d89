"""One module for each vendor; loaded when a pipeline first names it."""
