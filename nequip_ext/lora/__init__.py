"""LoRA for models of the NequIP framework, by config keys."""
