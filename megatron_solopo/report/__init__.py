"""Pages and pictures for people, from the files that runs and evaluations leave; needs neither torch nor megatron."""
