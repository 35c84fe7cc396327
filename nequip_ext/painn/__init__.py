"""PaiNN (Schütt, Unke, Gastegger, ICML 2021, arXiv 2102.03150) as a NequIP-framework model."""
