"""The fast forms of what the network needs."""
