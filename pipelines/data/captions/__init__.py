"""Where captions come from, and which are used."""
