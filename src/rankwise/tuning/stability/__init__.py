"""Is a scaling rule stable over ranks: measured on the user's model, data, optimizer and init, with a verdict."""
