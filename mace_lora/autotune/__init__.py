"""Classical-to-quantum transfer: pre-train on many classical labels, fine-tune on few quantum ones."""
