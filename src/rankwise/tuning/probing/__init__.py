"""Before training: how much there is to learn in a data set, what could hold it, and what to start with."""
