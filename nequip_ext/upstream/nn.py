"""Private modules that our models are made of; goes into packages, so it imports no more than that."""

# not from nequip.data, which would draw ASE into packages
from nequip.data._key_registry import register_fields
from nequip.nn._ghost_exchange_base import NoOpGhostExchangeModule

__all__ = ["NoOpGhostExchangeModule", "register_fields"]
