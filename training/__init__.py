"""How a model is trained: everything that needs Lightning."""
