"""The metrics themselves, a file for each kind of work that writes them; `tracking.registry` puts them together."""
