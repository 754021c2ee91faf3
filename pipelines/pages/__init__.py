"""HTML pages that need no other file: Jinja2 templates of one look, and plots that take their colours from it.

A page knows how to show; the module that owns its figures collects what is shown.
"""
