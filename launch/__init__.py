"""Turns "this command on that machine" into a job of an engine that exists: `python -m launch --help`.

Standard library only, and never imports tcjax or jax: a laptop without either can print and submit jobs.
"""
