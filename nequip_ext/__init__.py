"""equitune's NequIP extension: imported by every ``import nequip``, hence light.

NequIP interns this package into packaged models, so nothing here may import peft, transformers
or hydra.
"""

__version__ = "0.1.0"
