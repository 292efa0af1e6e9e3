"""The command line: one thin file per verb, loaded when it is used."""
