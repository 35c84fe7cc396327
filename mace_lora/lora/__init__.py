"""Degree-parity-independent LoRA: torch and e3nn only."""
