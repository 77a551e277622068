"""A run made ready, and how far it has come."""
