"""Two-stage framework: a teacher labels synthetic frames, a student learns from them and is fine-tuned."""
