"""FedLoRA."""
