"""The settings of the commands, as frozen dataclasses that flags and YAML files fill in."""
