"""Private modules that our models are made of; goes into packages, so it imports no more than that."""

from nequip.nn._ghost_exchange_base import NoOpGhostExchangeModule

__all__ = ["NoOpGhostExchangeModule"]
