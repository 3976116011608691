"""Supervised fine-tuning with LoRA."""
