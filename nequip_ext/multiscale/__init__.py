"""MultiScaleNequIP: NequIP on short edges beside a light NequIP on long ones."""
