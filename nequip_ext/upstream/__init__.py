"""The one door to NequIP's private names; ``tests/nequip_ext/test_contract.py`` checks them."""
