"""Classical-to-quantum transfer for NequIP-framework models."""
