"""The steps of a curation, each on its own."""
