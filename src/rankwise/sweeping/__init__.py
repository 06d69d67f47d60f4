"""`sweep`: rank x rule x learning rate x seed, on Ray; what the grid says, and its way in and out of other tools."""
