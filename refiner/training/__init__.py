"""Training: pretraining, heads and their loss, refining, fine-tuning, planning."""
