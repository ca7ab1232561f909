"""Models that answer prompts: here or on a server, for sampling and for evaluation."""
