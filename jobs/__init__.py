"""Entry points: the verbs of the ``lumos`` command, each also a script for ``ray job submit``."""
