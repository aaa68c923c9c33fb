"""How each kind of weight meets the network: one file a kind."""
