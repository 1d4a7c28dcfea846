"""The settings of the commands as values: what each one is, and how flags and YAML files give it."""
