"""Errors against labels, and the plots that go with them."""
