"""The miniature: a retrieval task, a model that learns it on short contexts, and runs of the trainer on it."""
