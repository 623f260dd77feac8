"""Products with the second derivatives of the inner loss: one file a way to get them."""
