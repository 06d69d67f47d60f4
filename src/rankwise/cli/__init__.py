"""The command line: parse, call one function, write records, say what matters."""
