"""Make preference data: contexts, sampled answers, triplets."""
