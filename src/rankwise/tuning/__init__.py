"""Learning rooms: what needs torch when it is called, and nothing of it at import."""
