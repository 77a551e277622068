"""From a command line, or a YAML file, to a checked configuration and recipe: argument parsing. No torch."""
