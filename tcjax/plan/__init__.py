"""Will it fit, and what would it cost: the trainer's own step compiled for a machine nobody here owns."""
