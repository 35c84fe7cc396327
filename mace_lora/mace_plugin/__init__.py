"""The only code that touches MACE's internals: start-up hook, patches, contract checks."""
