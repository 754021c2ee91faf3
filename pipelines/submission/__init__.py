"""Verbs of ``lumos`` as jobs of a Ray cluster: checked here, run there, followed from here."""
