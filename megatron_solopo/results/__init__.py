"""Files of results that evaluations write and reports read."""
