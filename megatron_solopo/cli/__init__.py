"""The command line of `megatron-solopo`."""
