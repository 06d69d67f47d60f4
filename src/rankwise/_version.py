"""The version, in a file of its own: asking the installed metadata for it costs 60 ms."""

__version__ = "0.1.0"
