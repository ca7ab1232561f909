"""What a model is, and which layouts fit it: read from its config.json, without Megatron."""
