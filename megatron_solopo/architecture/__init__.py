"""What a model is, which layouts fit it, and what GPUs can do, without Megatron."""
