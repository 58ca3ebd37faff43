"""The package lets people talk with a model: a terminal, a server, the turns between them."""
